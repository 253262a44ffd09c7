"""A real RTSP server: GStreamer's, run by the Python of the system, which has its bindings."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meliad_edge.stream.camera import CameraReader
from meliad_edge.stream.failures import FailureKind, diagnose
from meliad_edge.stream.reader import ReaderState
from meliad_edge.stream.uri import parse_source

SYSTEM_PYTHON = Path("/usr/bin/python3")
IMPORTS = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer
Gst.init(None)
wanted = ("videotestsrc", "x264enc", "rtph264pay", "jpegenc", "rtpjpegpay")
missing = [name for name in wanted if not Gst.ElementFactory.find(name)]
assert not missing, missing
"""
SERVER = (
    IMPORTS
    + """
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1")
server.set_service(sys.argv[1])

def add(path, pipeline, is_protected=False):
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(f"( {pipeline} )")
    factory.set_shared(True)
    if is_protected:
        permissions = GstRtspServer.RTSPPermissions()
        permissions.add_permission_for_role("watcher", "media.factory.access", True)
        permissions.add_permission_for_role("watcher", "media.factory.construct", True)
        factory.set_permissions(permissions)
    server.get_mount_points().add_factory(path, factory)

h264 = (
    "videotestsrc is-live=true pattern=ball ! video/x-raw,width=320,height=240,framerate=30/1 ! x264enc "
    "tune=zerolatency speed-preset=ultrafast key-int-max=15 ! rtph264pay name=pay0 pt=96 config-interval=1"
)
mjpeg = (
    "videotestsrc is-live=true ! video/x-raw,format=I420,width=160,height=120,framerate=15/1 ! "
    "jpegenc ! rtpjpegpay name=pay0 pt=26"
)
kind = sys.argv[2]
add("/h264", h264, kind != "open")
add("/mjpeg", mjpeg, kind != "open")
if kind != "open":
    auth = GstRtspServer.RTSPAuth()
    token = GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "watcher")
    if kind == "digest":
        auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
        auth.add_digest("me", "S3CR3T", token)
    else:
        auth.add_basic(GstRtspServer.RTSPAuth.make_basic("me", "S3CR3T"), token)
    server.set_auth(auth)
server.attach(None)
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
"""
)


def why_not_available() -> str:
    if not SYSTEM_PYTHON.exists():
        return "no system Python to run GStreamer's RTSP server"
    probe = subprocess.run([SYSTEM_PYTHON, "-c", IMPORTS], capture_output=True, text=True, check=False)
    return f"no GStreamer RTSP server: {probe.stderr.strip().splitlines()[-1]}" if probe.returncode else ""


Serve = Callable[..., int]


@pytest.fixture(scope="module")
def _available() -> None:
    if reason := why_not_available():
        pytest.skip(reason)


@pytest.fixture
def serve(_available: None) -> Iterator[Serve]:
    """Start a server of a kind, by default on any free port; returns its port. All are stopped in the end."""
    servers: list[subprocess.Popen[str]] = []

    def start(kind: str = "open", port: int = 0) -> int:
        process = subprocess.Popen(
            [SYSTEM_PYTHON, "-c", SERVER, str(port), kind], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        servers.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())

    def stop() -> None:
        for process in servers:
            process.kill()
            process.communicate()
        servers.clear()

    start.stop = stop  # type: ignore[attr-defined]
    yield start
    stop()


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    limit_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit_s, "did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize(("path", "shape"), [("h264", (240, 320, 3)), ("mjpeg", (120, 160, 3))])
def test_a_camera_is_read(serve: Serve, path: str, shape: tuple[int, ...]) -> None:
    camera = CameraReader(parse_source(f"rtsp://127.0.0.1:{serve()}/{path}"))
    camera.start(threading.Event())
    try:
        wait_until(lambda: camera.read >= 10)
        frame = camera.take()
    finally:
        camera.stop()
        camera.join(10)
    assert frame is not None and frame.image.shape == shape
    assert frame.image.std() > 1  # A picture, not a filler.
    assert camera.state is ReaderState.ENDED


def test_a_camera_that_goes_away_comes_back(serve: Serve) -> None:
    port = serve()
    camera = CameraReader(
        parse_source(f"rtsp://127.0.0.1:{port}/h264"), wait=lambda delay_s: time.sleep(min(delay_s, 0.2)) or False
    )
    camera.start(threading.Event())
    try:
        wait_until(lambda: camera.read >= 5)
        serve.stop()  # type: ignore[attr-defined]
        wait_until(lambda: camera.state is ReaderState.WAITING)
        read_before = camera.read
        serve(port=port)
        wait_until(lambda: camera.read > read_before)
    finally:
        camera.stop()
        camera.join(10)
    assert camera.reconnects == 1


@pytest.mark.parametrize("kind", ["basic", "digest"])
def test_credentials(serve: Serve, kind: str) -> None:
    host = f"127.0.0.1:{serve(kind)}"
    assert diagnose(parse_source(f"rtsp://{host}/h264")).kind is FailureKind.AUTH
    assert diagnose(parse_source(f"rtsp://me:wrong@{host}/h264")).kind is FailureKind.AUTH
    # With the right ones the server describes the stream: whatever is wrong then, it is not the credentials.
    assert diagnose(parse_source(f"rtsp://me:S3CR3T@{host}/h264")).kind is FailureKind.CODEC
    assert diagnose(parse_source(f"rtsp://me:S3CR3T@{host}/nothing")).kind is FailureKind.NOT_FOUND
    refused = CameraReader(parse_source(f"rtsp://me:wrong@{host}/h264"))
    refused._run()
    assert refused.state is ReaderState.FAILED
    assert "authentication failed (401)" in str(refused.error)
    assert "wrong" not in str(refused.error)
    camera = CameraReader(parse_source(f"rtsp://me:S3CR3T@{host}/h264"))
    camera.start(threading.Event())
    try:
        wait_until(lambda: camera.read >= 3)
    finally:
        camera.stop()
        camera.join(10)


def test_a_stream_that_is_not_there_is_not_found(serve: Serve) -> None:
    camera = CameraReader(parse_source(f"rtsp://127.0.0.1:{serve()}/nothing"), wait=lambda delay_s: True)
    camera._run()
    assert camera.is_in_doubt
    assert camera.state is ReaderState.FAILED
    assert "no such stream (404)" in str(camera.error)
