from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meliad_edge.errors import SourceError
from meliad_edge.stream.backoff import Backoff
from meliad_edge.stream.camera import AUTH_DELAY_S, FIRST_ATTEMPTS, CameraReader
from meliad_edge.stream.capture import Capture, Grab, VideoCapture
from meliad_edge.stream.failures import Failure, FailureKind, diagnose
from meliad_edge.stream.reader import ReaderState
from meliad_edge.stream.uri import SourceUri, parse_source

CAMERA = parse_source("rtsp://me:S3CR3T@cam.local/live")
LOST = Failure(FailureKind.ENDED, "the stream ended")
REFUSED = Failure(FailureKind.REFUSED, "connection refused")
AUTH = Failure(FailureKind.AUTH, "authentication failed (401)")
NOT_FOUND = Failure(FailureKind.NOT_FOUND, "the server has no such stream (404)")


class ScriptedVideo:
    """Delivers so many frames and is lost."""

    announced_frames = None
    description = "2x2"

    def __init__(self, frames: int, clock: Callable[[], float] = lambda: 0.0) -> None:
        self._left = frames
        self._clock = clock
        self.is_closed = False

    def read(self, is_wanted: Callable[[Grab], bool]) -> Capture | Failure | None:
        if self._left == 0:
            return LOST
        self._left -= 1
        now = self._clock()
        if not is_wanted(Grab(now, now, None)):
            return None
        return Capture(np.zeros((2, 2, 3), np.uint8), now, now, now)

    def close(self) -> None:
        self.is_closed = True


class Script:
    """What happens at each attempt to connect; at its end the reader is told to stop."""

    def __init__(self, *attempts: VideoCapture | Failure) -> None:
        self._attempts: Iterator[VideoCapture | Failure] = iter(attempts)
        self._left = len(attempts)
        self.delays_s: list[float] = []
        self.states: list[ReaderState] = []
        self.reader = CameraReader(
            CAMERA, clock=lambda: 0.0, backoff=Backoff(random.Random(0)), wait=self.wait, connect=self.connect
        )

    def connect(self, source: SourceUri) -> VideoCapture | Failure:
        self.states.append(self.reader.state)
        self._left -= 1
        return next(self._attempts)

    def wait(self, delay_s: float) -> bool:
        self.states.append(self.reader.state)
        self.delays_s.append(delay_s)
        return self._left == 0

    def run(self) -> CameraReader:
        self.reader._run()
        return self.reader


def test_a_lost_camera_comes_back_and_ids_go_on() -> None:
    first, second = ScriptedVideo(3), ScriptedVideo(2)
    script = Script(first, REFUSED, REFUSED, second)
    reader = script.run()
    assert (reader.read, reader.dropped, reader.reconnects) == (5, 4, 1)
    newest = reader.take()
    assert newest is not None and newest.id == 4
    assert reader.take() is None  # No frame is handed out twice.
    assert script.states == [ReaderState.CONNECTING, ReaderState.WAITING] * 4
    assert reader.state is ReaderState.ENDED
    assert first.is_closed and second.is_closed


def test_the_delay_grows_while_the_camera_is_away_and_falls_back_once_it_delivered() -> None:
    script = Script(ScriptedVideo(1), REFUSED, REFUSED, REFUSED, ScriptedVideo(1))
    script.run()
    lost, *away, lost_again = script.delays_s
    ceilings_s = [0.5, 1.0, 2.0, 4.0]
    assert all(c / 2 <= d <= c for d, c in zip([lost, *away], ceilings_s, strict=True))
    assert lost_again <= 0.5


def test_a_camera_that_refuses_the_credentials_is_given_up_at_once() -> None:
    script = Script(AUTH)
    reader = script.run()
    assert reader.state is ReaderState.FAILED
    assert script.delays_s == []
    with pytest.raises(SourceError, match=r"^rtsp://cam\.local/live: "):
        raise reader.error or AssertionError
    assert "S3CR3T" not in str(reader.error)


@pytest.mark.parametrize(
    ("failure", "patience"),
    [
        (NOT_FOUND, 1),
        (REFUSED, FIRST_ATTEMPTS),
        (Failure(FailureKind.CODEC, "the server answers, but sends no video"), FIRST_ATTEMPTS),
    ],
)
def test_a_camera_that_was_never_there_is_in_doubt_and_fails_when_it_is_stopped(
    failure: Failure, patience: int
) -> None:
    if patience > 1:
        assert not Script(*[failure] * (patience - 1)).run().is_in_doubt
    for attempts in (patience, patience + 20):
        script = Script(*[failure] * attempts)
        reader = script.run()
        assert reader.is_in_doubt
        assert len(script.delays_s) == attempts
        assert reader.state is ReaderState.FAILED
        assert str(reader.error).startswith("rtsp://cam.local/live: ")


def test_a_camera_that_is_there_at_last_is_in_doubt_no_more() -> None:
    reader = Script(*[REFUSED] * (FIRST_ATTEMPTS + 2), ScriptedVideo(1)).run()
    assert (reader.read, reader.is_in_doubt, reader.state) == (1, False, ReaderState.ENDED)


def test_a_camera_that_was_there_is_never_given_up() -> None:
    script = Script(ScriptedVideo(1), *[REFUSED, NOT_FOUND] * 50)
    reader = script.run()
    assert len(script.delays_s) == 101
    assert max(script.delays_s) <= 30.0
    assert (reader.state, reader.error) == (ReaderState.ENDED, None)


def test_a_camera_that_was_there_and_refuses_the_credentials_is_tried_so_rarely_that_it_locks_no_account() -> None:
    script = Script(ScriptedVideo(1), AUTH, AUTH, ScriptedVideo(1))
    reader = script.run()
    assert (reader.read, reader.error) == (2, None)
    assert script.delays_s[1:3] == [AUTH_DELAY_S, AUTH_DELAY_S]
    assert script.delays_s[3] <= 0.5


def test_an_old_frame_is_counted_and_not_scored() -> None:
    now_s = 100.0
    reader = CameraReader(
        CAMERA,
        clock=lambda: now_s,
        max_age_s=2.0,
        wait=lambda _: True,
        connect=lambda _: ScriptedVideo(1, clock=lambda: now_s),
    )
    reader._run()
    now_s += 2.5
    assert reader.take() is None
    assert (reader.read, reader.stale) == (1, 1)


@pytest.mark.parametrize(
    ("offered_fps", "max_fps", "expected"), [(25, 10, 100), (25, 24, 240), (25, 40, 250), (7, 5, 50)]
)
def test_the_frame_rate_that_is_wanted_is_reached_on_average(offered_fps: int, max_fps: int, expected: int) -> None:
    ticks = iter(range(10_000))
    reader = CameraReader(
        CAMERA,
        max_fps=max_fps,
        wait=lambda _: True,
        connect=lambda _: ScriptedVideo(10 * offered_fps, clock=lambda: next(ticks) / offered_fps),
    )
    reader._run()
    assert reader.read == pytest.approx(expected, abs=1)
    assert reader.read + reader.skipped == 10 * offered_fps


def test_a_frame_that_cannot_be_decoded_is_counted_and_leaves_a_gap() -> None:
    class Glitch(ScriptedVideo):
        def read(self, is_wanted: Callable[[Grab], bool]) -> Capture | Failure | None:
            if self._left == 2:
                self._left -= 1
                return Failure(FailureKind.CODEC, "a frame could not be decoded")
            return super().read(is_wanted)

    reader = Script(Glitch(3)).run()
    frame = reader.take()
    assert frame is not None and frame.id == 2
    assert (reader.read, reader.bad) == (2, 1)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    limit_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit_s, "did not happen in time"
        time.sleep(0.01)


def open_camera(url: str) -> CameraReader:
    return CameraReader(parse_source(url), wait=lambda delay_s: time.sleep(min(delay_s, 0.05)) or False)


def test_a_real_stream_that_is_cut_and_comes_back_with_another_resolution(mjpeg_server: Any) -> None:
    camera = open_camera(mjpeg_server.url)
    ready = threading.Event()
    camera.start(ready)
    try:
        wait_until(lambda: camera.read >= 5)
        mjpeg_server.size_hw = (96, 128)  # While streaming: OpenCV keeps the first size, but shows all of the picture.
        wait_until(lambda read_before=camera.read: camera.read >= read_before + 20)
        frame = camera.take()
        assert frame is not None
        assert frame.image.shape == (48, 64, 3)
        assert (frame.image[:, -16:] > 250).all() and frame.image[:, :16].mean() < 250
        mjpeg_server.cut()
        wait_until(lambda: camera.state is ReaderState.WAITING)
        camera.take()
        read_before = camera.read
        assert camera.take() is None  # Nothing is invented while the camera is away.
        mjpeg_server.start()
        wait_until(lambda: camera.read > read_before)
        frame = camera.take()
        assert frame is not None
        assert frame.image.shape == (96, 128, 3)
        assert frame.id >= read_before
        assert camera.reconnects == 1
        assert any("connection refused" in n or "ended" in n for n in camera.notices)
    finally:
        camera.stop()
        camera.join(10)
    assert camera.state is ReaderState.ENDED


def test_a_slow_consumer_gets_the_newest_frame_of_a_real_stream(mjpeg_server: Any) -> None:
    camera = open_camera(mjpeg_server.url)
    camera.start(threading.Event())
    try:
        ids = []
        for _ in range(5):
            wait_until(lambda: camera.read >= 10 * (len(ids) + 1))
            read_before = camera.read
            frame = camera.take()
            assert frame is not None
            ids.append(frame.id)
            assert frame.id >= read_before - 1
    finally:
        camera.stop()
        camera.join(10)
    assert ids == sorted(set(ids))
    assert camera.read == len(ids) + camera.dropped + len(camera._buffer)
    assert camera.dropped > 0


def test_real_servers_are_diagnosed(mjpeg_server: Any) -> None:
    def kind_at(url: str) -> FailureKind:
        return diagnose(parse_source(url)).kind

    host = f"127.0.0.1:{mjpeg_server.port}"
    assert kind_at(f"http://{host}/nothing") is FailureKind.NOT_FOUND
    assert kind_at("http://no-such-host.invalid/live") is FailureKind.NOT_FOUND
    assert kind_at(f"http://{host}/live") is FailureKind.CODEC  # It answers, so only the video can be at fault.
    mjpeg_server.user_info = "me:S3CR3T"
    assert kind_at(f"http://{host}/live") is FailureKind.AUTH
    assert kind_at(f"http://me:wrong@{host}/live") is FailureKind.AUTH
    assert kind_at(f"http://me:S3CR3T@{host}/live") is FailureKind.CODEC
    mjpeg_server.cut()
    assert kind_at(f"http://{host}/live") is FailureKind.REFUSED
    assert kind_at(f"rtsp://{host}/live") is FailureKind.REFUSED
    assert kind_at("v4l2:///dev/no-such-video") is FailureKind.NOT_FOUND


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_what_may_not_be_opened_is_no_matter_of_the_password(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for url in ("v4l2:///dev/null", "rtsp://cam.local/live"):
        failure = diagnose(parse_source(url))
        assert failure.kind is FailureKind.PERMISSION
        assert str(failure.to_error(parse_source(url))).startswith(f"{url}: no permission to read it; check its perm")


def test_a_host_that_cannot_be_looked_up_now_may_be_there_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    for scheme in ("http", "rtsp"):
        assert diagnose(parse_source(f"{scheme}://cam.local/live")).kind is FailureKind.TIMEOUT


def test_a_server_that_never_answers_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/live"
        assert diagnose(parse_source(url), timeout_s=0.1).kind is FailureKind.TIMEOUT
        http_url = url.replace("rtsp", "http")
        assert diagnose(parse_source(http_url), timeout_s=0.1).kind is FailureKind.TIMEOUT


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b""])
def test_a_server_that_speaks_something_else_is_diagnosed(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(2):
                with server.accept()[0] as connection:
                    connection.recv(4096)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        for scheme in ("http", "rtsp"):
            url = f"{scheme}://127.0.0.1:{server.getsockname()[1]}/live"
            assert diagnose(parse_source(url)).kind is FailureKind.REFUSED


@pytest.mark.parametrize("host", ["cam..local", "c" * 64 + ".local"])
def test_a_host_that_can_have_no_such_name_is_not_found(host: str) -> None:
    for scheme in ("http", "rtsp"):
        assert diagnose(parse_source(f"{scheme}://{host}/live")).kind is FailureKind.NOT_FOUND


def test_credentials_reach_a_real_server_and_nothing_else(mjpeg_server: Any) -> None:
    mjpeg_server.user_info = "me:S3CR3T"
    camera = open_camera(mjpeg_server.url.replace("://", "://me:S3CR3T@"))
    camera.start(threading.Event())
    try:
        wait_until(lambda: camera.read >= 1)
    finally:
        camera.stop()
        camera.join(10)
    assert "S3CR3T" not in repr(camera.source) + "".join(camera.notices)
