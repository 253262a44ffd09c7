"""Metrics of a running watch for Prometheus; ``grafana.json`` beside this module is a dashboard of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from prometheus_client import CollectorRegistry, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

import meliad_edge
from meliad_edge.monitor.board import Board, CameraStatus
from meliad_edge.monitor.condition import CONDITIONS as CAMERA_CONDITIONS
from meliad_edge.monitor.model_info import ModelInfo
from meliad_edge.stream.reader import ReaderState
from meliad_edge.stream.watcher import BLIND_CONDITIONS, Decision

# Seconds; closest where the decisions of edge devices are, and at their budgets.
LATENCY_BUCKETS_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0,
    5.0,
)  # fmt: skip
# Written as 0 even before they are first seen: an alert on a series that does not exist never fires.
CONDITIONS = (*BLIND_CONDITIONS, *CAMERA_CONDITIONS)


@dataclass(frozen=True, slots=True)
class SinkStatus:
    """How the delivery of events to one place stands.

    Attributes:
        name: What the place is called, without credentials.
        pending: State changes waiting to be delivered.
        lost: State changes given up.
    """

    name: str
    pending: int
    lost: int


class Metrics:
    """Everything that is measured, in a registry of its own.

    Args:
        board: Cameras and their scores.
        model: What decides.
        threshold: Raw score at or above which a frame is anomalous, now.
        sinks: How deliveries stand, now.
    """

    def __init__(
        self,
        board: Board,
        model: ModelInfo,
        *,
        threshold: Callable[[], float],
        sinks: Callable[[], Sequence[SinkStatus]] = tuple,
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        build = Info("meliad_build", "Version of meliad-edge.", registry=self._registry)
        build.info({"version": meliad_edge.__version__})
        facts = {name: str(value) for name, value in asdict(model).items()}
        Info("meliad_model", "The model that decides.", registry=self._registry).info(facts)
        frame_to_decision = Histogram(
            "meliad_frame_to_decision_seconds",
            "From taking the decoded frame up to the decision.",
            ["camera"],
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        capture_to_decision = Histogram(
            "meliad_capture_to_decision_seconds",
            "From the capture of a frame to the decision on it; what the frame waited is part of it.",
            ["camera"],
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._engine = Histogram(
            "meliad_engine_seconds",
            "Of a decision, what the engine took; frames that were scored together share theirs.",
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        # Looking a label up costs as much as counting.
        self._frame_to_decision = {name: frame_to_decision.labels(name) for name in board.cameras}
        self._capture_to_decision = {name: capture_to_decision.labels(name) for name in board.cameras}
        self._registry.register(_Standing(board, threshold, sinks))

    def record_decision(self, decision: Decision) -> None:
        """Take in a decision; called by the frame loop."""
        self._frame_to_decision[decision.camera].observe(decision.frame_to_decision_s)
        self._capture_to_decision[decision.camera].observe(decision.capture_to_decision_s)
        self._engine.observe(decision.prediction.times.infer_s)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics as text, and the media type of it.

        Args:
            accept: The ``Accept`` header of who asks: the text format of Prometheus, or OpenMetrics if preferred.
        """
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type


class _Standing:
    """What is read when somebody asks, rather than counted along the way."""

    def __init__(self, board: Board, threshold: Callable[[], float], sinks: Callable[[], Sequence[SinkStatus]]) -> None:
        self._board = board
        self._threshold = threshold
        self._sinks = sinks

    def collect(self) -> Iterable[Metric]:
        """The metrics as they stand; called by the registry."""
        statuses = self._board.statuses()
        yield self._frames(statuses)
        yield _counter(
            "meliad_anomaly_events",
            "Anomaly events that began.",
            {status.name: status.events for status in statuses},
        )
        yield _counter(
            "meliad_camera_reconnects",
            "How often a live camera came back.",
            {status.name: status.reconnects for status in statuses},
        )
        yield _gauge(
            "meliad_camera_up",
            "Whether a camera delivers.",
            {status.name: status.state == ReaderState.STREAMING.value for status in statuses},
        )
        yield self._conditions(statuses)
        yield _gauge(
            "meliad_anomaly_open",
            "Whether an anomaly event of a camera is open.",
            {status.name: status.anomaly is not None for status in statuses},
        )
        yield _gauge(
            "meliad_score_drift",
            "Whether the normal scores of a camera have left those of the calibration.",
            {status.name: status.drift != "" for status in statuses},
        )
        yield _gauge(
            "meliad_score",
            "Raw score of the latest frame of a camera.",
            {status.name: status.latest.prediction.score for status in statuses if status.latest is not None},
        )
        yield GaugeMetricFamily(
            "meliad_threshold",
            "Raw score at or above which a frame is anomalous.",
            value=self._threshold(),
        )
        sinks = self._sinks()
        yield _gauge(
            "meliad_sink_pending",
            "State changes of events waiting to be delivered.",
            {sink.name: sink.pending for sink in sinks},
            label="sink",
        )
        yield _counter(
            "meliad_sink_lost",
            "State changes of events that were given up.",
            {sink.name: sink.lost for sink in sinks},
            label="sink",
        )

    def _frames(self, statuses: Sequence[CameraStatus]) -> Metric:
        family = CounterMetricFamily(
            "meliad_frames",
            "What became of frames. Of those read, each is scored, dropped, stale, late, or a misfit whose size is not "
            "that of the view; missed ones are scored too; bad and skipped ones are not among those read.",
            labels=["camera", "outcome"],
        )
        for status in statuses:
            for outcome, count in asdict(status.frames).items():
                family.add_metric([status.name, outcome], count)
        return family

    def _conditions(self, statuses: Sequence[CameraStatus]) -> Metric:
        family = GaugeMetricFamily(
            "meliad_camera_condition", "Whether this is wrong with a camera.", labels=["camera", "condition"]
        )
        for status in statuses:
            for condition in dict.fromkeys([*CONDITIONS, *filter(None, [status.condition])]):
                family.add_metric([status.name, condition], float(status.condition == condition))
        return family


def _counter(name: str, documentation: str, values: dict[str, int], *, label: str = "camera") -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _gauge(
    name: str, documentation: str, values: dict[str, int] | dict[str, bool] | dict[str, float], *, label: str = "camera"
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, documentation, labels=[label])
    for key, value in values.items():
        family.add_metric([key], float(value))
    return family
