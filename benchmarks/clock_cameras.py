"""Cameras that film a clock: Motion JPEG over HTTP on loopback, from a process of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.benchmarks.picture_clock import draw_clock
from meliad_edge.child_process import end_with_parent

# The upper part of every picture; below it is what is to be judged.
CLOCK_ROWS = 32
_QUALITY = 90
_BOUNDARY = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n"


@contextmanager
def clock_cameras(
    good: NDArray[np.uint8], bad: NDArray[np.uint8], *, fps: float, bad_every_s: float, bad_for_s: float
) -> Iterator[str]:
    """Serve ``good``, and for ``bad_for_s`` seconds in every ``bad_every_s`` ``bad``; gives the address.

    Args:
        good: uint8 RGB [H, W, 3]; the clock is drawn above it.
        bad: Of the same size.
        fps: Pictures per second, for each connection.
        bad_every_s: Seconds from one bad part to the next.
        bad_for_s: How long each is seen.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, good, bad, fps, bad_every_s, bad_for_s), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/live"
    finally:
        process.kill()
        process.join()


def _serve(
    connection: Connection,
    good: NDArray[np.uint8],
    bad: NDArray[np.uint8],
    fps: float,
    bad_every_s: float,
    bad_for_s: float,
) -> None:
    end_with_parent()
    film = _Film([_with_clock(picture) for picture in (good, bad)], fps, bad_every_s, bad_for_s)

    class Camera(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:  # noqa: N802
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            number = 0
            with contextlib.suppress(OSError):
                while True:
                    number, picture = film.after(number)
                    self.wfile.write(_BOUNDARY % (len(picture), picture))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    server.daemon_threads = True
    threading.Thread(target=film.run, daemon=True).start()
    connection.send(server.server_address[1])
    server.serve_forever()


class _Film:
    """The newest picture, made once for all cameras."""

    def __init__(self, pictures: Sequence[NDArray[np.uint8]], fps: float, bad_every_s: float, bad_for_s: float) -> None:
        self._good, self._bad = pictures
        self._interval_s = 1.0 / fps
        self._bad_every_s, self._bad_for_s = bad_every_s, bad_for_s
        self._changed = threading.Condition()
        self._number, self._newest = 0, b""

    def run(self) -> None:
        start_s = due_s = time.monotonic()
        while True:
            due_s += self._interval_s
            time.sleep(max(0.0, due_s - time.monotonic()))
            now_s = time.monotonic()
            # The bad part comes at the end of every period.
            is_bad = (now_s - start_s) % self._bad_every_s >= self._bad_every_s - self._bad_for_s
            picture = self._bad if is_bad else self._good
            draw_clock(picture[:CLOCK_ROWS], round(1000 * now_s) % 2**32)
            _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
            with self._changed:
                self._number, self._newest = self._number + 1, data.tobytes()
                self._changed.notify_all()

    def after(self, number: int) -> tuple[int, bytes]:
        """The newest picture once there is one after this number."""
        with self._changed:
            self._changed.wait_for(lambda: self._number > number)
            return self._number, self._newest


def _with_clock(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    above = np.zeros((CLOCK_ROWS, *picture.shape[1:]), np.uint8)
    return np.concatenate([above, np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), dtype=np.uint8)])
