from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from meliad_edge.bundle import Manifest, open_bundle, write_bundle
from meliad_edge.calibrate import calibrate
from meliad_edge.device_threshold import LiveThreshold
from meliad_edge.event_store import EventStore
from meliad_edge.events import Event, EventKind, EventState, EventTracker, Moment, Window
from meliad_edge.monitor.board import Board
from meliad_edge.monitor.liveness import Liveness
from meliad_edge.monitor.metrics import Metrics, SinkStatus
from meliad_edge.monitor.model_info import ModelInfo
from meliad_edge.monitor.web.access import Access
from meliad_edge.monitor.web.app import create_app
from meliad_edge.monitor.web.server import WebServer
from meliad_edge.precision import DEFAULT_LIMITS
from meliad_edge.runtime.engine import RawScores
from meliad_edge.runtime.predictor import Predictor
from meliad_edge.sinks.folder import FolderSink
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.reader import Reader, ReaderState
from meliad_edge.stream.sources import open_source
from meliad_edge.stream.uri import SourceKind, SourceUri, parse_source
from meliad_edge.stream.watcher import Camera, Decision, Watcher

NORMAL, ANOMALOUS = 40, 200
TOKEN = "correct-horse-battery-staple"


class BrightnessEngine:
    """The map of a frame is the mean level of each of 4 x 4 cells, its score the highest of them."""

    name = "brightness"
    input_size_hw = (32, 32)

    def __init__(self) -> None:
        self.is_broken = False
        self.nearest = -1

    def infer(self, frames: NDArray[np.uint8]) -> RawScores:
        cells = frames.reshape(len(frames), 4, 8, 4, 8, 3).mean(axis=(2, 4, 5), dtype=np.float32)
        nearest = np.full((len(frames), 2, 4, 4), self.nearest, np.int64)
        if self.is_broken:
            cells = np.full_like(cells, np.nan)
        return RawScores(cells.max(axis=(1, 2)), cells, nearest)


@pytest.fixture
def bundle_file(tmp_path: Path) -> Path:
    """A bundle whose calibration scores are 1 to 99."""
    manifest = Manifest(
        name="line3", detector="test", backbone="none", input_hw=(32, 32), grid_hw=(4, 4), top_cells=1, version=7,
        precisions={"fp32": DEFAULT_LIMITS["fp32"]}, created_by="tests", dataset="none", licence="none",
        train_normals=3, shots=1,
    )  # fmt: skip
    file = tmp_path / "line3.meliad"
    write_bundle(file, manifest, {"fp32": b""}, calibrate(list(range(1, 100))), [], [])
    return file


def picture(level: int, *, spot: int | None = None, size_hw: tuple[int, int] = (240, 320)) -> NDArray[np.uint8]:
    """A uniform picture, with a brighter quarter if so wished."""
    image = np.full((*size_hw, 3), level, np.uint8)
    if spot is not None:
        image[: size_hw[0] // 4, : size_hw[1] // 4] = spot
    return image


@pytest.fixture
def pictures() -> Callable[..., NDArray[np.uint8]]:
    return picture


@dataclass
class Watch:
    """What a running watch has, fed by hand.

    Attributes:
        now_s: The monotonic clock of the board.
        wall_s: When the next frame is captured; every frame moves it on by a quarter of a second.
    """

    folder: Path
    bundle_file: Path
    names: list[str]
    token: str | None = None
    sinks: list[SinkStatus] = field(default_factory=list)
    now_s: float = 100.0
    wall_s: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.predictor = Predictor(open_bundle(self.bundle_file), BrightnessEngine(), "fp32")
        self.readers: dict[str, Reader] = {}
        for number, name in enumerate(self.names):
            address = f"rtsp://10.0.0.{number}/live"
            self.readers[name] = open_source(SourceUri(SourceKind.RTSP, name, address, address))
            self.readers[name].state = ReaderState.STREAMING
        self.board = Board([Camera(reader) for reader in self.readers.values()], clock=lambda: self.now_s)
        self.threshold = LiveThreshold(self.predictor, self.bundle_file)
        self.store = EventStore(self.folder / "events")
        self.sink = FolderSink(self.store, self.predictor.bundle.calibration.colour_range)
        model = ModelInfo.of(self.predictor)
        self.metrics = Metrics(
            self.board, model, threshold=lambda: self.threshold.calibration.threshold, sinks=lambda: self.sinks
        )
        self.access = Access(self.token, clock=lambda: self.now_s)
        self._ids = itertools.count()

    def make_app(self) -> Any:
        return create_app(
            self.board,
            self.threshold,
            ModelInfo.of(self.predictor),
            self.metrics,
            store=self.store,
            access=self.access,
            liveness=Liveness(self.board, clock=lambda: self.now_s),
        )

    def decide(self, camera: str, image: NDArray[np.uint8], *, latency_s: float = 0.02) -> Decision:
        """Let a camera deliver a frame, as the frame loop would."""
        self.now_s += 0.25
        self.wall_s += 0.25
        frame = Frame(camera, next(self._ids), self.now_s, image, 0.001, self.wall_s)
        decision = Decision(camera, frame, self.predictor.predict(image), "", latency_s / 2.0, latency_s)
        self.board.record_decision(decision)
        self.metrics.record_decision(decision)
        return decision

    def begin_anomaly(self, camera: str, *, spot: int = ANOMALOUS) -> Event:
        """Let an anomaly event begin."""
        decision = self.decide(camera, picture(NORMAL, spot=spot))
        event = EventTracker(camera, Window(1, 1)).update(decision.frame, decision.prediction)
        assert event is not None
        self.publish(event)
        return event

    def begin_condition(self, camera: str, kind: EventKind, condition: str, detail: str) -> Event:
        """Let something become wrong with a camera or its scores."""
        seen = Moment(self.now_s, self.wall_s)
        tracked = EventTracker(camera, Window(1, 1)).update(
            *((decision := self.decide(camera, picture(NORMAL, spot=ANOMALOUS))).frame, decision.prediction)
        )
        assert tracked is not None
        event = replace(
            tracked, kind=kind, condition=condition, detail=detail, started=seen, last_seen=seen, prediction=None
        )
        self.publish(event)
        return event

    def end(self, event: Event) -> None:
        self.publish(replace(event, state=EventState.END))

    def publish(self, event: Event) -> None:
        self.board.record_event(event)
        self.sink.publish(event)


@dataclass
class Site:
    """A watch and the server of its page."""

    watch: Watch
    server: WebServer
    url: str

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20.0, trust_env=False, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **options)


NAMES = ["belt", "Förderband 2/oben links", "<img src=x onerror=document.title='hacked'>"]


@pytest.fixture
def watch(tmp_path: Path, bundle_file: Path) -> Iterator[Watch]:
    watch = Watch(tmp_path, bundle_file, NAMES)
    yield watch
    watch.sink.close()


@pytest.fixture
def other_watch(tmp_path: Path, bundle_file: Path) -> Iterator[Watch]:
    """Of other cameras."""
    watch = Watch(tmp_path / "other", bundle_file, ["oven"])
    yield watch
    watch.sink.close()


@pytest.fixture
def site(watch: Watch) -> Iterator[Site]:
    """Open to everybody on this machine."""
    server = WebServer(watch.make_app())
    yield Site(watch, server, server.start())
    server.stop()


@pytest.fixture
def locked_site(tmp_path: Path, bundle_file: Path) -> Iterator[Site]:
    """Only for those who know the token."""
    watch = Watch(tmp_path, bundle_file, NAMES, TOKEN)
    server = WebServer(watch.make_app())
    yield Site(watch, server, server.start())
    server.stop()
    watch.sink.close()


@pytest.fixture
def hang() -> Callable[[Watch], None]:
    """Let frames wait for a frame loop that takes none up."""

    def hang(watch: Watch) -> None:
        watch.board.watcher = Watcher(
            watch.predictor,
            [Camera(reader) for reader in watch.readers.values()],
            on_event=watch.publish,
            on_notice=watch.board.record_notice,
            on_failure=lambda name, error: None,
        )
        watch.readers["belt"].read = 3

    return hang


@pytest.fixture
def run_watch(tmp_path: Path) -> Callable[[Watch], Watcher]:
    """Let a watch really run, over a folder with four normal pictures, two anomalous ones and one that is damaged."""

    def run(watch: Watch) -> Watcher:
        folder = tmp_path / "pictures"
        folder.mkdir()
        for number, level in enumerate([NORMAL, NORMAL, ANOMALOUS, NORMAL, ANOMALOUS, NORMAL]):
            cv2.imwrite(str(folder / f"{number}.png"), picture(level))
        (folder / "9.png").write_bytes(b"not a picture")
        camera = Camera(open_source(parse_source(str(folder))))
        watch.board = Board([camera])
        model = ModelInfo.of(watch.predictor)
        watch.metrics = Metrics(watch.board, model, threshold=lambda: watch.threshold.calibration.threshold)

        def publish(event: Event) -> None:
            watch.board.record_event(event)
            watch.sink.publish(event)

        def decide(decision: Decision) -> None:
            watch.board.record_decision(decision)
            watch.metrics.record_decision(decision)

        watcher = watch.board.watcher = Watcher(
            watch.predictor,
            [camera],
            on_event=publish,
            on_notice=watch.board.record_notice,
            on_failure=lambda name, error: None,
            on_decision=decide,
        )
        watcher.run()
        return watcher

    return run
