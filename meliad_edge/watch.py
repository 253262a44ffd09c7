"""A watch put together: cameras on one model, and everything that listens to what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from meliad_edge.calibrate import Calibration
from meliad_edge.device_threshold import LiveThreshold
from meliad_edge.errors import MeliadError, UsageError
from meliad_edge.event_store import EventStore
from meliad_edge.events import Event
from meliad_edge.monitor.board import Board
from meliad_edge.monitor.condition import ConditionMonitor
from meliad_edge.monitor.drift import DriftMonitor
from meliad_edge.monitor.model_info import ModelInfo
from meliad_edge.runtime.batching import measure_batch_size
from meliad_edge.runtime.predictor import Predictor
from meliad_edge.sinks.clips import Clip, ClipRecorder, ClipSink
from meliad_edge.sinks.delivery import Delivery, DeliveryStatus, Destination
from meliad_edge.sinks.destinations import MqttAddress, WebhookAddress, open_destination
from meliad_edge.sinks.folder import FolderSink
from meliad_edge.sinks.sink import EventQueue, QueuedSink, Sink
from meliad_edge.stream.credentials import Credentials, find_credentials, with_credentials
from meliad_edge.stream.sources import open_source
from meliad_edge.stream.uri import SourceUri, parse_source, redact, with_unique_names
from meliad_edge.stream.watcher import Camera, Decision, Watcher, WatchSummary
from meliad_edge.watch_config import CameraConfig, PageAddress

if TYPE_CHECKING:
    from meliad_edge.monitor.metrics import Metrics, SinkStatus

_LARGEST_BATCH = 8
_LOOK_EVERY_S = 1.0


def open_cameras(
    predictor: Predictor,
    configs: Sequence[CameraConfig],
    secrets: Mapping[str, Credentials],
    give_up: Callable[[str, MeliadError], None],
    *,
    calibration: Calibration | None = None,
) -> list[Camera]:
    """The cameras that can be watched, not started; one that cannot is given up and the rest goes on.

    Args:
        predictor: Decides on their frames.
        configs: How each is watched.
        secrets: Credentials by name of the camera.
        give_up: Takes the name of a source that cannot be opened, and why.
        calibration: What the scores of a camera shall be like; None watches neither cameras nor scores for that.

    Raises:
        UsageError: There are credentials for a camera that is not there.
    """
    parsed: list[tuple[SourceUri, CameraConfig]] = []
    for config in configs:
        try:
            source = parse_source(config.source)
        except MeliadError as error:
            give_up(config.name or redact(config.source), error)
        else:
            parsed.append((source if config.name is None else replace(source, name=config.name), config))
    named = with_unique_names([source for source, _ in parsed])
    if unknown := secrets.keys() - {source.name for source in named}:
        names = ", ".join(source.name for source in named)
        msg = f"credentials for {', '.join(sorted(unknown))}, but there is no such camera; there are {names}"
        raise UsageError(msg)
    cameras = []
    for source, (_, config) in zip(named, parsed, strict=True):
        try:
            camera = _open_camera(source, config, secrets, calibration)
            predictor.check_mask(camera.view)
            cameras.append(camera)
        except MeliadError as error:
            give_up(source.name, error)
    return cameras


class Watch:
    """Cameras, the frame loop, and what listens to it; closed in order when the ``with`` block is left.

    Args:
        predictor: Decides on frames.
        cameras: What is watched.
        store: Where events are kept; None keeps none.
        destinations: Where events are delivered from the store.
        sinks: Further places where events go.
        on_notice: Takes the name of a source and a fact about it.
        on_failure: Takes the name of a source that is given up, and why.
        on_decision: Takes every decision; must not wait.
    """

    def __init__(
        self,
        predictor: Predictor,
        cameras: Sequence[Camera],
        *,
        store: EventStore | None = None,
        destinations: Sequence[WebhookAddress | MqttAddress] = (),
        sinks: Sequence[Sink[Event]] = (),
        on_notice: Callable[[str, str], None],
        on_failure: Callable[[str, MeliadError], None],
        on_decision: Callable[[Decision], None] = lambda decision: None,
    ) -> None:
        self.board = Board(cameras)
        self._cameras = cameras
        self.store = store
        self._predictor = predictor
        self._metrics: Metrics | None = None
        self._on_notice = on_notice
        self._on_decision = on_decision
        self._open = ExitStack()
        path = predictor.bundle.path
        self._model_file = _ModelFile(path, lambda notice: on_notice(path.name, notice))
        self.sinks: list[EventQueue] = []
        self.deliveries: list[Delivery] = []
        self.delivery_statuses: list[DeliveryStatus] = []  # As they stood when all was closed.
        self._clips: ClipRecorder | None = None
        if store is not None:
            self._open.enter_context(store.claimed())
            store.end_interrupted()
            for address in destinations:
                self._add_delivery(store, open_destination(address, self.board.cameras))
            self._add_sink(FolderSink(store, predictor.bundle.calibration.colour_range))
            clips: QueuedSink[Clip] = QueuedSink(ClipSink(store))
            self._open.callback(clips.close)
            scenes = [camera.name for camera in cameras if camera.reader.is_sequence]
            self._clips = ClipRecorder(scenes, clips.publish)
            self._open.callback(self._clips.finish)
        for sink in sinks:
            self._add_sink(sink)
        self.batch_size = _choose_batch_size(predictor, cameras)
        self.watcher = self.board.watcher = Watcher(
            predictor,
            cameras,
            batch_size=self.batch_size,
            on_event=self._take_event,
            on_notice=self._take_notice,
            on_failure=on_failure,
            on_decision=self._take_decision,
        )

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self.delivery_statuses = [delivery.status for delivery in self.deliveries]
        if self.store is not None:
            self.store.close()

    def serve(self, address: PageAddress) -> str:
        """Serve the page, its interface and the metrics until the ``with`` block is left; returns the URL.

        Raises:
            MissingExtraError: The extra ``monitor`` is not installed.
            UsageError: The address cannot be used, or others could reach it without a token.
        """
        from meliad_edge.monitor.metrics import Metrics
        from meliad_edge.monitor.web.access import Access
        from meliad_edge.monitor.web.app import create_app
        from meliad_edge.monitor.web.server import WebServer

        threshold = LiveThreshold(self._predictor, self._predictor.bundle.path)
        model = ModelInfo.of(self._predictor)
        metrics = Metrics(
            self.board, model, threshold=lambda: threshold.calibration.threshold, sinks=self._sink_statuses
        )
        app = create_app(self.board, threshold, model, metrics, store=self.store, access=Access(address.token))
        server = WebServer(app, address.host, address.port, certificate=address.certificate, key=address.key)
        url = server.start()
        self._open.callback(server.stop)
        self._metrics = metrics
        return url

    def run(self, *, max_frames: int | None = None, needs_camera: bool = False) -> None:
        """Watch until every source is finished, ``max_frames`` were scored, or an exception such as Ctrl-C.

        A watch that keeps events or serves its page is left alone, and waits for cameras that are switched on later.

        Args:
            max_frames: None sets no limit.
            needs_camera: End all the same when no camera is there.
        """
        is_left_alone = self.store is not None or self._metrics is not None
        self.watcher.run(max_frames=max_frames, waits_for_cameras=is_left_alone and not needs_camera)

    def summary(self) -> WatchSummary:
        """Counters and latencies so far."""
        return self.watcher.summary()

    def _sink_statuses(self) -> list[SinkStatus]:
        from meliad_edge.monitor.metrics import SinkStatus

        queued = [
            SinkStatus(
                sink.name,
                pending=sink.published - sink.delivered - sink.overflowed - sink.failed,
                lost=sink.overflowed + sink.failed,
            )
            for sink in self.sinks
        ]
        delivered = (delivery.status for delivery in self.deliveries)
        return queued + [SinkStatus(one.name, one.pending, one.lost + one.rejected) for one in delivered]

    def _add_delivery(self, store: EventStore, destination: Destination) -> None:
        delivery = Delivery(store, destination)
        self._open.callback(delivery.close)
        self.deliveries.append(delivery)

    def _add_sink(self, sink: Sink[Event]) -> None:
        # Files wait for a slow disk; cameras do not.
        queued = EventQueue(sink, lossless=not any(camera.reader.source.is_live for camera in self._cameras))
        self._open.callback(queued.close)
        self.sinks.append(queued)

    def _take_event(self, event: Event) -> None:
        for sink in self.sinks:
            sink.publish(event)
        if self._clips is not None:
            self._clips.record_event(event)
        self.board.record_event(event)

    def _take_decision(self, decision: Decision) -> None:
        self._model_file.look(decision.frame.captured_s)
        if self._clips is not None:
            self._clips.record_decision(decision)
        self.board.record_decision(decision)
        if self._metrics is not None:
            self._metrics.record_decision(decision)
        self._on_decision(decision)

    def _take_notice(self, camera: str, notice: str) -> None:
        self.board.record_notice(camera, notice)
        self._on_notice(camera, notice)


class _ModelFile:
    """Says once that the file of the model is not the one that was opened any more."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self._path = path
        self._tell = tell
        self._opened = self._state()
        self._looked_s = 0.0
        self._is_told = False

    def look(self, now_s: float) -> None:
        """Look, if that was not done just now."""
        if self._is_told or now_s - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        if self._state() != self._opened:
            self._is_told = True
            self._tell("was replaced; this watch goes on with the model that it opened, restart it to use the new one")

    def _state(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns


def _open_camera(
    source: SourceUri, config: CameraConfig, secrets: Mapping[str, Credentials], calibration: Calibration | None
) -> Camera:
    credentials = find_credentials(source.name, secrets)
    if credentials is not None:
        source = with_credentials(source, credentials)
    lasts = source.is_live or config.follow
    return Camera(
        open_source(source, max_fps=config.max_fps, follow=config.follow),
        view=config.to_view(),
        window=config.to_window(),
        latency_budget_s=None if config.latency_budget_ms is None else 1e-3 * config.latency_budget_ms,
        monitor=ConditionMonitor() if calibration is not None and source.is_live else None,
        drift=DriftMonitor(calibration.scores) if calibration is not None and lasts else None,
    )


def _choose_batch_size(predictor: Predictor, cameras: Sequence[Camera]) -> int:
    """As many cameras at once as pay; one camera has nothing to wait for."""
    if len(cameras) < 2:
        return 1
    golden = [golden.frame for golden in predictor.bundle.golden]
    return measure_batch_size(predictor.engine, golden, min(len(cameras), _LARGEST_BATCH))
