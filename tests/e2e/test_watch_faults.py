"""What happens to cameras and machines, done to a real RTSP server in a network of its own.

Every picture shows the clock at which it was made (tests/stream/clock_camera.py), so each frame that was scored proves
its age, and a frame that nobody filmed cannot be read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from meliad_edge.errors import MeliadError
from meliad_edge.events import Event, EventState
from meliad_edge.runtime.predictor import Prediction, StageTimes
from meliad_edge.runtime.view import View
from meliad_edge.stream.camera import MAX_AGE_S, CameraReader
from meliad_edge.stream.reader import ReaderState
from meliad_edge.stream.uri import parse_source
from meliad_edge.stream.watcher import Camera, Decision, Watcher

SYSTEM_PYTHON = Path("/usr/bin/python3")
CLOCK_CAMERA = Path(__file__).parents[1] / "stream" / "clock_camera.py"
IMPORTS = (
    "import gi; gi.require_version('Gst', '1.0'); gi.require_version('GstRtspServer', '1.0'); "
    "from gi.repository import Gst, GstRtspServer; Gst.init(None); "
    "assert all(map(Gst.ElementFactory.find, ['appsrc', 'x264enc', 'rtph264pay', 'jpegenc', 'rtpjpegpay']))"
)
# H.264 leaves the camera two pictures late, and a busy machine adds some.
PATH_S = 0.6
PORT = 8554


def why_not_available() -> str:
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("nft")):
        return "needs root, ip and nft for a network of its own"
    if not SYSTEM_PYTHON.exists() or subprocess.run([SYSTEM_PYTHON, "-c", IMPORTS], capture_output=True).returncode:
        return "needs GStreamer's RTSP server and the system Python's bindings"
    made = subprocess.run(["ip", "netns", "add", "mel-probe"], capture_output=True)
    subprocess.run(["ip", "netns", "del", "mel-probe"], capture_output=True)
    return "" if made.returncode == 0 else "network namespaces cannot be made"


def read_clock(image: NDArray[np.uint8]) -> int | None:
    """The milliseconds that a picture shows; None when its two halves do not agree."""
    height, width = image.shape[:2]
    rows = [round((row + 0.5) * height / 4) for row in range(4)]
    columns = [round((column + 0.5) * width / 16) for column in range(16)]
    bits = image[np.ix_(rows, columns)][..., 1] > 128
    value, inverted = bits[:2].ravel(), bits[2:].ravel()
    return None if (value == inverted).any() else int("".join("01"[bit] for bit in value.astype(int)), 2)


@dataclass
class ClockPredictor:
    """Reads the clock of every frame instead of judging it."""

    infer_s: float = 0.0
    ages_s: list[float] = field(default_factory=list)
    shown_ms: list[int] = field(default_factory=list)
    unreadable: int = 0

    def predict_all(self, views: Sequence[tuple[NDArray[np.uint8], View]]) -> list[Prediction]:
        now_ms = 1000 * time.monotonic()
        for image, _ in views:
            shown = read_clock(image)
            if shown is None:
                self.unreadable += 1
            else:
                self.shown_ms.append(shown)
                self.ages_s.append(1e-3 * (now_ms - shown))
        time.sleep(self.infer_s)
        return [Prediction(0.0, 1.0, np.zeros((1, 1), np.float32), (), StageTimes(0, 0, 0)) for _ in views]


class Network:
    """A camera behind a cable: a namespace, a pair of interfaces, and rules that lose packets."""

    numbers = count(os.getpid() % 200)

    def __init__(self) -> None:
        number = next(self.numbers) % 250
        self.name, self.outside, self.inside = f"melcam{number}", f"melo{number}", f"meli{number}"
        self.address = f"10.213.{number}.2"
        self._servers: list[subprocess.Popen[str]] = []
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", self.outside, "type", "veth", "peer", "name", self.inside, "netns", self.name)
        run("ip", "addr", "add", f"10.213.{number}.1/24", "dev", self.outside)
        run("ip", "link", "set", self.outside, "up")
        self.within("ip", "addr", "add", f"{self.address}/24", "dev", self.inside)
        self.within("ip", "link", "set", self.inside, "up")
        self.within("nft", "add", "table", "inet", "fault")
        for hook in ("input", "output"):
            rule = f"{{ type filter hook {hook} priority 0; }}"
            self.within("nft", f"add chain inet fault {hook} {rule}")

    @property
    def url(self) -> str:
        return f"rtsp://{self.address}:{PORT}/live"

    def within(self, *command: str) -> None:
        run("ip", "netns", "exec", self.name, *command)

    def film(
        self, codec: str = "h264", size: tuple[int, int] = (320, 240), user_info: str = "", port: int = PORT
    ) -> None:
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, str(SYSTEM_PYTHON), str(CLOCK_CAMERA), str(port), codec,
             *map(str, size), "25", *([user_info] if user_info else [])],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline(), "the camera did not start"
        self._servers.append(process)

    def kill_camera(self) -> None:
        for process in self._servers:
            process.kill()
            process.communicate()
        self._servers.clear()

    def lose(self, percent: int) -> None:
        """Drop so many of a hundred packets in each direction, silently."""
        for hook in ("input", "output"):
            self.within("nft", f"flush chain inet fault {hook}")
            if percent:
                which = "" if percent == 100 else f"numgen random mod 100 < {percent}"
                self.within("nft", f"add rule inet fault {hook} {which} drop")

    def close(self) -> None:
        self.kill_camera()
        run("ip", "netns", "del", self.name)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def _available() -> None:
    if reason := why_not_available():
        pytest.skip(reason)


@pytest.fixture
def network(_available: None) -> Iterator[Network]:
    made = Network()
    yield made
    made.close()


class Watched:
    """A watch in a thread of its own."""

    def __init__(self, *urls: str, infer_s: float = 0.0) -> None:
        self.predictor = ClockPredictor(infer_s)
        self.readers = [CameraReader(parse_source(url)) for url in urls]
        self.events: list[Event] = []
        self.notices: list[str] = []
        self.failures: list[MeliadError] = []
        self.decisions: list[tuple[str, int, float]] = []
        self.watcher = Watcher(
            self.predictor,
            [Camera(reader) for reader in self.readers],
            on_event=self.events.append,
            on_notice=lambda name, text: self.notices.append(text),
            on_failure=lambda name, error: self.failures.append(error),
            on_decision=self._keep,
        )
        self._thread = threading.Thread(target=self.watcher.run, daemon=True)

    def _keep(self, decision: Decision) -> None:
        self.decisions.append((decision.camera, decision.frame.id, decision.frame.captured_s))

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.watcher.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def wait_for_frames(self, frames: int, timeout_s: float = 40.0) -> None:
        """Wait until so many more frames were scored."""
        target = self.watcher.scored + frames
        wait_until(lambda: self.watcher.scored >= target, timeout_s)

    def check(self) -> None:
        """No frame was invented, shown twice, out of order, or older than allowed when it was taken up."""
        assert self.predictor.unreadable == 0
        shown = self.predictor.shown_ms
        assert all(a < b for a, b in zip(shown, shown[1:], strict=False))
        assert max(self.predictor.ages_s) < MAX_AGE_S + PATH_S
        ids = [frame_id for _, frame_id, _ in self.decisions]
        assert all(a < b for a, b in zip(ids, ids[1:], strict=False))


def wait_until(condition: Callable[[], bool], timeout_s: float = 40.0) -> None:
    limit_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit_s, "did not happen in time"
        time.sleep(0.02)


def test_the_first_frame_is_fresh_and_so_is_every_other(network: Network) -> None:
    network.film()
    with Watched(network.url) as watched:
        watched.wait_for_frames(50)
    watched.check()
    # What piled up while the stream was opened, about a second, was not scored.
    assert watched.predictor.ages_s[0] < 0.5
    (source,) = watched.watcher.summary().sources
    assert source.frames.stale > 0


def test_a_camera_that_is_killed_and_comes_back_with_another_codec_and_size(network: Network) -> None:
    network.film("h264", (320, 240))
    with Watched(network.url) as watched:
        for codec, size in (("mjpeg", (320, 240)), ("h264", (640, 480)), ("mjpeg", (160, 128))):
            watched.wait_for_frames(20)
            network.kill_camera()
            wait_until(lambda: watched.readers[0].state is not ReaderState.STREAMING)
            network.film(codec, size)
        watched.wait_for_frames(20)
        assert watched.readers[0].reconnects == 3
        assert "160x128" in watched.readers[0].description
    watched.check()
    assert watched.failures == []


def test_three_packets_of_ten_lost(network: Network) -> None:
    network.film()
    with Watched(network.url) as watched:
        watched.wait_for_frames(25)
        network.lose(30)
        lossy_since = len(watched.predictor.ages_s)
        time.sleep(15.0)
        during = len(watched.predictor.ages_s) - lossy_since
        network.lose(0)
        watched.wait_for_frames(50, 60)
        after = watched.predictor.ages_s[-10:]
    watched.check()
    (source,) = watched.watcher.summary().sources
    print(
        f"\nwhile 30 % of the packets were lost: {during} frames in 15 s scored, {source.frames.stale} too old, "
        f"{source.reconnects} reconnects; oldest scored {max(watched.predictor.ages_s):.2f} s"
    )
    assert max(after) < 0.5


def test_a_connection_that_is_half_open_is_noticed_and_made_again(network: Network) -> None:
    network.film()
    with Watched(network.url) as watched:
        watched.wait_for_frames(25)
        network.lose(100)  # No packet says that anything is wrong.
        network.kill_camera()
        network.film()  # It knows nothing of the connection any more.
        wait_until(lambda: any(event.condition == "lost" for event in watched.events))
        wait_until(lambda: watched.readers[0].state is not ReaderState.STREAMING)
        network.lose(0)
        watched.wait_for_frames(25, 60)
    watched.check()
    lost = [(event.condition, event.state.value) for event in watched.events]
    assert lost == [("lost", "new"), ("lost", "end")]
    assert any("connecting again" in notice for notice in watched.notices)


def test_a_camera_that_is_switched_on_long_after_the_watch_is_watched(network: Network) -> None:
    network.film()
    with Watched(network.url, network.url.replace(str(PORT), "8555")) as watched:
        late = watched.readers[1]
        wait_until(lambda: late.is_in_doubt)
        watched.wait_for_frames(25)
        network.film(port=8555)
        wait_until(lambda: late.read >= 25, 60.0)
    assert (watched.failures, watched.predictor.unreadable) == ([], 0)
    assert max(watched.predictor.ages_s) < MAX_AGE_S + PATH_S
    lost = [event for event in watched.events if event.camera == late.source.name]
    assert [event.state for event in lost] == [EventState.NEW, EventState.END]


def test_a_cable_that_is_pulled_for_a_moment_brings_no_old_pictures(network: Network) -> None:
    network.film()
    with Watched(network.url) as watched:
        watched.wait_for_frames(25)
        network.lose(100)
        time.sleep(3.0)  # Shorter than the time-out: what was filmed meanwhile comes in a burst.
        network.lose(0)
        watched.wait_for_frames(50, 60)
    watched.check()
    assert watched.watcher.summary().sources[0].frames.stale > 10


def test_a_wrong_password_is_final_and_is_never_shown(network: Network) -> None:
    network.film(user_info="me:right")
    url = network.url.replace("rtsp://", "rtsp://me:S3CR3T@")
    with Watched(url, network.url.replace("rtsp://", "rtsp://me:right@")) as watched:
        watched.wait_for_frames(25)
        wait_until(lambda: bool(watched.failures))
    (error,) = watched.failures
    assert "authentication failed (401)" in str(error)
    assert "S3CR3T" not in f"{error} {watched.notices} {watched.events}"
    assert watched.watcher.summary().sources[0].state is ReaderState.FAILED
    watched.check()


def test_a_model_that_is_slower_than_the_camera_sees_the_newest_picture(network: Network) -> None:
    network.film("mjpeg")
    with Watched(network.url, infer_s=0.2) as watched:
        watched.wait_for_frames(15)
    watched.check()
    assert max(watched.predictor.ages_s[2:]) < 0.2


CLI = "from meliad_edge.cli import main; main()"


class WatchProcess:
    """The verb in a process of its own; what it says is kept."""

    def __init__(self, *arguments: object, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLI, "watch", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self.lines: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def says(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def end(self) -> int:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)

    def __enter__(self) -> WatchProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reading.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()


def _fake_time_library() -> str:
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return str(found[0]) if found else ""


def test_a_clock_that_is_set_while_it_watches(network: Network, bundle: Path, tmp_path: Path) -> None:
    library = _fake_time_library()
    if not library:
        pytest.skip("needs libfaketime")
    from meliad_edge.event_store import EventStore

    network.film("mjpeg")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    environment = {
        "LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_RESET": "1",
    }  # fmt: skip
    folder = tmp_path / "out"
    with WatchProcess(bundle, network.url, "--out", folder, "--window", "1/1", environment=environment) as watch:
        wait_until(lambda: (folder / "events.sqlite").exists())
        store = EventStore(folder)
        wait_until(lambda: bool(store.events()), 60)
        (before,) = store.events()
        for offset in ("+7d", "-3d"):
            clock.write_text(offset)
            time.sleep(2.0)
            assert watch.is_running()
        network.kill_camera()
        wait_until(lambda: store.events(kind="anomaly")[-1].state == "end" or not watch.is_running(), 30)
        assert watch.end() == 0
    events = store.events(kind="anomaly")
    assert [event.id for event in events] == [before.id]
    assert events[0].started_s == before.started_s
    record = events[0].record
    # By the monotonic clock: some seconds, whatever the other one was set to.
    assert 3.0 < record["duration_s"] < 60.0


def drop_picture(inbox: Path, name: str, level: int = 200) -> None:
    """Put a picture into a folder that is followed."""
    cv2.imwrite(str(inbox / name), np.full((64, 64, 3), level, np.uint8))


def test_a_full_disk_costs_no_event(bundle: Path, tmp_path: Path) -> None:
    from meliad_edge.event_store import EventStore

    disk, inbox = tmp_path / "disk", tmp_path / "inbox"
    disk.mkdir()
    inbox.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk]).returncode:
        pytest.skip("needs root to mount a small disk")
    try:
        with WatchProcess(bundle, inbox, "--follow", "--out", disk / "events") as watch:
            drop_picture(inbox, "0.png")
            wait_until(lambda: watch.says("ANOMALY"))
            store = EventStore(disk / "events")
            wait_until(lambda: [event.state for event in store.events()] == ["end"])
            with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(4096))
            for number in (1, 2, 3):
                drop_picture(inbox, f"{number}.png")
            wait_until(lambda: watch.says("3.png") and watch.says("cannot write"))
            assert len(store.events()) == 1
            (disk / "ballast").unlink()
            wait_until(lambda: [event.state for event in store.events()] == ["end"] * 4)
            assert watch.end() == 0
        assert all((event.folder / "frame.png").stat().st_size > 0 for event in store.events())
        assert not watch.says("lost")
        store.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_model_file_that_is_replaced_is_said_and_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    with WatchProcess(bundle, inbox, "--follow") as watch:
        drop_picture(inbox, "0.png")
        wait_until(lambda: watch.says("0.png"))
        partial = bundle.with_suffix(".partial")
        partial.write_bytes(b"another model")
        partial.replace(bundle)
        for number in count(1):
            drop_picture(inbox, f"{number}.png")
            wait_until(lambda number=number: watch.says(f"{number}.png"))  # type: ignore[misc]
            if watch.says("was replaced; this watch goes on with the model"):
                break
            assert number < 40
        bundle.unlink()
        drop_picture(inbox, "last.png")
        wait_until(lambda: watch.says("last.png"))
        assert sum("was replaced" in line for line in watch.lines) == 1
        assert watch.end() == 0


def test_a_broker_that_is_down_and_back_gets_every_event_in_order(bundle: Path, tmp_path: Path) -> None:
    mosquitto = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
    mqtt = pytest.importorskip("paho.mqtt.client")
    if mosquitto is None:
        pytest.skip("needs mosquitto")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    inbox, received = tmp_path / "inbox", []
    inbox.mkdir()

    def start_broker() -> subprocess.Popen[bytes]:
        return subprocess.Popen([mosquitto, "-p", str(port)], stderr=subprocess.DEVNULL)

    def listen() -> Any:
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        client.on_message = lambda client, data, message: received.append(json.loads(message.payload))
        client.on_connect = lambda client, *_: client.subscribe("line/events", qos=1)
        wait_until(lambda: _connects(client, port))
        client.loop_start()
        return client

    broker = start_broker()
    client = listen()
    try:
        out = ("--out", tmp_path / "events", "--out", f"mqtt://127.0.0.1:{port}/line")
        with WatchProcess(bundle, inbox, "--follow", *out) as watch:
            drop_picture(inbox, "0.png")
            wait_until(lambda: len(received) == 2)
            broker.kill()
            broker.wait()
            client.loop_stop()
            for number in (1, 2):
                drop_picture(inbox, f"{number}.png")
            wait_until(lambda: watch.says("2.png"))
            broker = start_broker()
            client = listen()
            wait_until(lambda: len(received) == 6, 90)
            assert watch.end() == 0
    finally:
        client.loop_stop()
        broker.kill()
        broker.wait()
    told = [(message["after"]["source"], message["type"]) for message in received]
    assert told == [(f"{number}.png", state) for number in (0, 1, 2) for state in ("new", "end")]


def _connects(client: Any, port: int) -> bool:
    try:
        client.connect("127.0.0.1", port)
    except OSError:
        return False
    return True


@pytest.fixture
def bundle(tmp_path: Path) -> Any:
    """A real bundle whose score is the brightest cell: half of the clock's blocks are white."""
    return make_bundle(tmp_path)


def make_bundle(folder: Path) -> Path:
    onnx = pytest.importorskip("onnx", reason="writing a test model needs the extra export")
    from meliad_edge.bundle import Manifest, write_bundle
    from meliad_edge.calibrate import calibrate
    from meliad_edge.precision import DEFAULT_LIMITS

    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        brightness (uint8[N, 32, 32, 3] frames)
            => (float[N] score_raw, float[N, 4, 4] map_raw, int64[N, 2, 4, 4] nearest)
        <int64[1] axis_one = {1}>
        {
            levels = Cast<to = 1>(frames)
            grey = ReduceMean<axes = [3], keepdims = 0>(levels)
            grey_channel = Unsqueeze(grey, axis_one)
            pooled = AveragePool<kernel_shape = [8, 8], strides = [8, 8]>(grey_channel)
            map_raw = Squeeze(pooled, axis_one)
            score_raw = ReduceMax<axes = [1, 2], keepdims = 0>(map_raw)
            zero_map = Sub(pooled, pooled)
            planes = Concat<axis = 1>(zero_map, zero_map)
            nearest = Cast<to = 7>(planes)
        }
        """
    )
    path = folder / "brightness.meliad"
    manifest = Manifest(
        name="brightness", detector="test", backbone="none", input_hw=(32, 32), grid_hw=(4, 4), top_cells=1,
        precisions={"fp32": DEFAULT_LIMITS["fp32"]},
        created_by="tests", dataset="none", licence="none", train_normals=3, shots=0,
    )  # fmt: skip
    write_bundle(path, manifest, {"fp32": model.SerializeToString()}, calibrate([6.0, 8.0, 10.0]), [], [])
    return path
