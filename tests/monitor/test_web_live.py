from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, BinaryIO

import httpx
import numpy as np
import pytest

from meliad_edge.event_store import Verdict
from meliad_edge.monitor.web.live import LivePictures
from meliad_edge.monitor.web.updates import Updates


class Viewer:
    """Reads the parts of a multipart stream one by one; its buffer is as small as it can be."""

    def __init__(self, url: str, camera: int = 0) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.connection = socket.socket()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.connection.settimeout(20.0)
        self.connection.connect((host, int(port)))
        request = f"GET /api/v1/cameras/{camera}/live.mjpg HTTP/1.1\r\nHost: {host}\r\n\r\n"
        self.connection.sendall(request.encode())
        self.parts = self._parts()

    def close(self) -> None:
        self.parts.close()
        self.connection.close()

    def _parts(self) -> Iterator[bytes]:
        with self.connection.makefile("rb") as stream:
            head = _read_head(stream)
            assert head[0].startswith("HTTP/1.1 200"), head
            body = _Chunks(stream)
            while True:
                assert body.read_line() == "--frame"
                assert body.read_line() == "Content-Type: image/jpeg"
                length = int(body.read_line().removeprefix("Content-Length: "))
                assert body.read_line() == ""
                yield body.read(length)
                assert body.read_line() == ""


class _Chunks:
    """The body of a chunked response."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._left = b""

    def read(self, length: int) -> bytes:
        while len(self._left) < length:
            size = int(self._stream.readline(), 16)
            assert size > 0, "the stream has ended"
            self._left += self._stream.read(size)
            self._stream.readline()
        taken, self._left = self._left[:length], self._left[length:]
        return taken

    def read_line(self) -> str:
        line = b""
        while not line.endswith(b"\r\n"):
            line += self.read(1)
        return line[:-2].decode()


def _read_head(stream: BinaryIO) -> list[str]:
    lines = []
    while (line := stream.readline().decode().strip()) != "":
        lines.append(line)
    return lines


@pytest.fixture
def look(site: Any) -> Iterator[Callable[..., Viewer]]:
    viewers: list[Viewer] = []

    def open_viewer(camera: int = 0) -> Viewer:
        viewers.append(Viewer(site.url, camera))
        return viewers[-1]

    yield open_viewer
    for viewer in viewers:
        viewer.close()


def noise(seed: int) -> np.ndarray[Any, Any]:
    """A picture that JPEG cannot make small."""
    return np.random.default_rng(seed).integers(0, 255, (720, 960, 3), np.uint8)


def test_live_pictures_follow_the_camera(site: Any, look: Any, pictures: Any) -> None:
    site.watch.decide("belt", pictures(40))
    viewer = look()
    first = next(viewer.parts)
    assert first.startswith(b"\xff\xd8")
    assert first.endswith(b"\xff\xd9")
    site.watch.decide("belt", pictures(120))
    assert next(viewer.parts) != first


def test_one_who_never_reads_holds_up_nobody(site: Any, look: Any) -> None:
    watch = site.watch
    watch.decide("belt", noise(0))
    slow, quick = look(), look()
    shown = [next(quick.parts)]
    for seed in range(1, 25):
        watch.decide("belt", noise(seed))
        shown.append(next(quick.parts))
        assert site.get("/api/v1/cameras").status_code == 200
    assert len(set(shown)) == 25
    assert sum(map(len, shown)) > 5_000_000, "more than the buffers of the kernel hold"
    received = [next(slow.parts)]
    while received[-1] != shown[-1]:  # In the end it too gets the newest.
        received.append(next(slow.parts))
    assert len(received) < 15, "what it could not take was never queued"


def test_viewers_are_limited(site: Any, look: Any, pictures: Any) -> None:
    site.watch.decide("belt", pictures(40))
    viewers = [look() for _ in range(16)]
    for viewer in viewers:
        next(viewer.parts)
    refused = site.get("/api/v1/cameras/0/live.mjpg")
    assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
    assert site.get("/api/v1/cameras/0/snapshot.jpg").status_code == 200
    viewers[0].close()
    for _ in range(1000):  # The server notices it in its own time.
        with site.client() as client, client.stream("GET", "/api/v1/cameras/0/live.mjpg") as response:
            if response.status_code == 200:
                return
    raise AssertionError("the place of one who left is not given to another")


def run_with_pictures(watch: Any, body: Callable[[LivePictures], Awaitable[None]]) -> None:
    async def run() -> None:
        pictures = LivePictures(watch.board, watch.threshold, clock=lambda: watch.now_s)
        try:
            await body(pictures)
        finally:
            pictures.close()

    asyncio.run(run())


def test_a_picture_is_encoded_once_for_all_who_look(watch: Any, pictures: Any) -> None:
    watch.decide("belt", pictures(40))

    async def body(live: LivePictures) -> None:
        seen = await asyncio.gather(*(live.newest("belt", with_overlay=True) for _ in range(8)))
        assert all(picture is seen[0] for picture in seen)
        assert await live.newest("belt", with_overlay=True) is seen[0]
        assert await live.newest("belt", with_overlay=False) is not seen[0]
        assert await live.newest(watch.names[1], with_overlay=True) is None

    run_with_pictures(watch, body)


def test_at_most_ten_pictures_a_second_are_encoded(watch: Any, pictures: Any) -> None:
    async def body(live: LivePictures) -> None:
        frames = []
        for level in range(20, 40):
            watch.decide("belt", pictures(level))
            watch.now_s += 0.03 - 0.25  # Frames come every 30 ms.
            picture = await live.newest("belt", with_overlay=False)
            assert picture is not None
            frames.append(picture.frame)
        assert len(set(frames)) == 5  # in 0.6 s, each 0.12 s apart

    run_with_pictures(watch, body)


def test_one_who_leaves_does_not_take_the_picture_from_others(watch: Any) -> None:
    watch.decide("belt", noise(1))

    async def body(live: LivePictures) -> None:
        leaving = asyncio.create_task(live.newest("belt", with_overlay=False))
        staying = asyncio.create_task(live.newest("belt", with_overlay=False))
        await asyncio.sleep(0)
        leaving.cancel()
        assert (await staying) is not None

    run_with_pictures(watch, body)


class Ticks:
    """Stands in for the pauses of a stream: time passes at once, and at each something may happen."""

    def __init__(self, watch: Any, *happenings: Callable[[], object]) -> None:
        self._watch = watch
        self._happenings = list(happenings)

    async def pause(self, seconds: float) -> bool:
        self._watch.now_s += seconds
        if not self._happenings:
            return False
        self._happenings.pop(0)()
        return True


def listen(watch: Any, *happenings: Callable[[], object]) -> list[dict[str, Any]]:
    """What a listener is told while things happen, half a second apart."""

    async def run() -> list[dict[str, Any]]:
        updates = Updates(watch.board, watch.threshold, watch.store, clock=lambda: watch.now_s, wall_clock=lambda: 7.0)
        return [message async for message in updates.messages(Ticks(watch, *happenings))]  # type: ignore[arg-type]

    messages = asyncio.run(run())
    for message in messages:
        assert message.startswith(b"data: ")
        assert message.endswith(b"\n\n")
        assert message.count(b"\n") == 2
    return [json.loads(message.removeprefix(b"data: ")) for message in messages]


def nothing() -> None:
    pass


def test_a_listener_is_told_what_is_new(watch: Any, pictures: Any) -> None:
    watch.begin_anomaly("belt")
    watch.wall_s += 1.0
    event = None

    def begin() -> None:
        nonlocal event
        event = watch.begin_anomaly(watch.names[1])

    first, frame, began, judged, moved = listen(
        watch,
        lambda: watch.decide("belt", pictures(60)),
        begin,
        lambda: watch.store.judge(event.id, Verdict.CONFIRMED),
        lambda: watch.threshold.move(value=55.0),
    )
    assert [camera["name"] for camera in first["state"]["cameras"]] == watch.names
    assert "events" not in first, "whoever listens asks for what was before"
    assert frame["state"]["cameras"][0]["points"][-1][1:] == [60.0, watch.threshold.shipped.threshold]
    assert [changed["id"] for changed in began["events"]] == [event.id]
    assert began["state"]["cameras"][1]["anomaly"] == event.id
    assert [(changed["id"], changed["verdict"]) for changed in judged["events"]] == [(event.id, "confirmed")]
    assert moved["state"]["threshold"] == 55.0


def test_a_listener_hears_that_the_watch_is_there(watch: Any) -> None:
    messages = listen(watch, *[nothing] * 21)
    assert [set(message) for message in messages] == [{"time_s", "state"}, {"time_s"}, {"time_s"}]
    assert messages[1]["time_s"] == 7.0


def test_every_listener_is_told_on_its_own(watch: Any) -> None:
    """One who comes later is not told of what others were told."""

    async def run() -> tuple[list[bytes], list[bytes]]:
        updates = Updates(watch.board, watch.threshold, watch.store, clock=lambda: watch.now_s)
        early = updates.messages(Ticks(watch, lambda: watch.begin_anomaly("belt"), nothing))  # type: ignore[arg-type]
        first = [await anext(early), await anext(early)]
        late = [message async for message in updates.messages(Ticks(watch, nothing))]  # type: ignore[arg-type]
        return first, late

    early, late = asyncio.run(run())
    assert b'"events":[{' in early[1]
    assert len(late) == 1
    assert b'"events"' not in late[0]


def test_a_store_that_cannot_be_read_does_not_end_the_updates(
    watch: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    def fail(**options: Any) -> None:
        msg = "database is locked"
        raise sqlite3.OperationalError(msg)

    monkeypatch.setattr(watch.store, "events", fail)
    _, told = listen(watch, lambda: watch.decide("belt", pictures(60)))
    assert told["state"]["cameras"][0]["score"] == 60.0


def test_updates_come_over_http(site: Any, pictures: Any) -> None:
    with (
        httpx.Client(base_url=site.url, trust_env=False, timeout=20.0) as client,
        client.stream("GET", "/api/v1/updates") as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        site.watch.decide("belt", pictures(77))
        for line in lines:
            camera = json.loads(line.removeprefix("data: "))["state"]["cameras"][0]
            if camera["score"] == 77.0:
                break
