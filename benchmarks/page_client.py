"""What one open page asks of a watch: its updates, and pictures of every camera as fast as the page ever takes them."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

# As monitor/web/static/live.js: ten a second of two tiles, and no more of all of them together.
_PICTURES_PER_S = 20.0


@contextmanager
def open_page(url: str, cameras: int) -> Iterator[None]:
    """Look at a watch, without a browser's own work, until the block is left.

    Args:
        url: Of the page.
        cameras: How many it shows.
    """
    address = urlsplit(url)
    closing = threading.Event()
    threads = [
        threading.Thread(target=ask, args=(address.hostname, address.port, closing), daemon=True)
        for ask in (_follow_updates, *(_show_camera(number, cameras) for number in range(cameras)))
    ]
    for thread in threads:
        thread.start()
    yield
    closing.set()
    for thread in threads:
        thread.join(5.0)


def _follow_updates(host: str, port: int, closing: threading.Event) -> None:
    connection = http.client.HTTPConnection(host, port, timeout=1.0)
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.request("GET", "/api/v1/updates")
        response = connection.getresponse()
        while not closing.is_set() and response.readline():
            pass


def _show_camera(number: int, cameras: int) -> Callable[[str, int, threading.Event], None]:
    interval_s = max(2, cameras) / _PICTURES_PER_S

    def show(host: str, port: int, closing: threading.Event) -> None:
        connection = http.client.HTTPConnection(host, port, timeout=5.0)
        shown = ""
        with contextlib.closing(connection), contextlib.suppress(OSError):
            due_s = time.monotonic()
            while not closing.wait(max(0.0, due_s - time.monotonic())):
                due_s = max(due_s, time.monotonic()) + interval_s
                headers = {"If-None-Match": shown} if shown else {}
                connection.request("GET", f"/api/v1/cameras/{number}/snapshot.jpg?overlay=1", headers=headers)
                response = connection.getresponse()
                response.read()
                shown = response.headers.get("ETag") or ""

    return show
