"""What the page and the metrics show: written by the frame loop, read by other threads."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from meliad_edge.events import Event, EventKind, EventState
from meliad_edge.monitor.latency import LatencyRecorder, LatencySummary
from meliad_edge.stream.watcher import Camera, Decision, FrameCounts, Watcher

# The highest score of each second, for an hour.
_KEPT_POINTS = 3600
_FPS_WINDOW_S = 10.0
_SUMMARISED_FRAMES = 2048


@dataclass(frozen=True, slots=True)
class ScorePoint:
    """The highest decision of one second in the history of a camera.

    Attributes:
        time_s: Capture time, seconds since 1970.
        score: Raw score; one that is not a number counts as the highest.
        threshold: The one that was in force.
    """

    time_s: float
    score: float
    threshold: float


@dataclass(frozen=True, slots=True)
class CameraStatus:
    """A camera as it stands.

    Attributes:
        name: Name of the source.
        address: Its whole address, without credentials.
        state: Value of its :class:`~meliad_edge.stream.reader.ReaderState`.
        description: Size and codec.
        condition: What is wrong with the camera, in one word; ``""`` when all is well.
        condition_detail: The same in one sentence, with the figures.
        drift: What is wrong with its scores, in one word; ``""`` when all is well.
        drift_detail: The same in one sentence, with the figures.
        anomaly: Id of the anomaly event that is open; None when there is none.
        events: Anomaly events that began.
        fps: Decisions per second over the last ten seconds.
        latest: The latest decision, if there is one.
        frames: What became of its frames; zeros when they were not asked for.
        reconnects: How often it came back.
        notice: The latest fact about it.
        capture_to_decision: Latency of the latest frames; None before the first.
    """

    name: str
    address: str
    state: str
    description: str
    condition: str
    condition_detail: str
    drift: str
    drift_detail: str
    anomaly: str | None
    events: int
    fps: float
    latest: Decision | None
    frames: FrameCounts
    reconnects: int
    notice: str
    capture_to_decision: LatencySummary | None


@dataclass(slots=True)
class _Line:
    """What is kept of one camera."""

    camera: Camera
    scores: deque[ScorePoint] = field(default_factory=lambda: deque(maxlen=_KEPT_POINTS))
    decided_s: deque[float] = field(default_factory=lambda: deque(maxlen=1024))
    latency: LatencyRecorder = field(default_factory=lambda: LatencyRecorder(_SUMMARISED_FRAMES))
    latest: Decision | None = None
    notice: str = ""
    events: int = 0
    open_events: dict[str, Event] = field(default_factory=dict)


class Board:
    """Everything that is shown about a running watch; recording costs the frame loop some microseconds.

    Args:
        cameras: What is watched, in the order shown.
        clock: Monotonic seconds.
    """

    def __init__(self, cameras: Sequence[Camera], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines = {camera.name: _Line(camera) for camera in cameras}
        self._clock = clock
        self._lock = threading.Lock()
        self.watcher: Watcher | None = None  # Set once the watch is built; it counts the frames.

    @property
    def cameras(self) -> list[str]:
        """Names of the cameras."""
        return list(self._lines)

    def record_decision(self, decision: Decision) -> None:
        """Take in a decision; called by the frame loop."""
        line = self._lines[decision.camera]
        prediction = decision.prediction
        point = ScorePoint(decision.frame.captured_wall_s, prediction.score, prediction.threshold)
        with self._lock:
            line.latest = decision
            if not line.scores or int(line.scores[-1].time_s) != int(point.time_s):
                line.scores.append(point)
            elif point.score > line.scores[-1].score or math.isnan(point.score):
                line.scores[-1] = point
            line.decided_s.append(self._clock())
            line.latency.record(decision.capture_to_decision_s)

    def record_event(self, event: Event) -> None:
        """Take in a state change; called by the frame loop."""
        line = self._lines[event.camera]
        with self._lock:
            if event.state is EventState.END:
                line.open_events.pop(event.id, None)
            else:
                line.open_events[event.id] = event
            line.events += event.kind is EventKind.ANOMALY and event.state is EventState.NEW

    def record_notice(self, camera: str, notice: str) -> None:
        """Take in a fact about a camera; called by the frame loop."""
        with self._lock:
            if (line := self._lines.get(camera)) is not None:
                line.notice = notice

    def latest(self, camera: str) -> Decision | None:
        """The latest decision on a camera, or None.

        Raises:
            KeyError: There is no such camera.
        """
        return self._lines[camera].latest

    def scores(self, camera: str, *, since_s: float = 0.0) -> list[ScorePoint]:
        """Score history of a camera, oldest first.

        Args:
            camera: Its name.
            since_s: Only what was captured after this time, seconds since 1970.

        Raises:
            KeyError: There is no such camera.
        """
        with self._lock:
            newest_first = reversed(self._lines[camera].scores)
            kept = []
            for point in newest_first:
                if point.time_s <= since_s:
                    break
                kept.append(point)
        return kept[::-1]

    def statuses(self, *, with_frames: bool = True) -> list[CameraStatus]:
        """Every camera as it stands.

        Args:
            with_frames: Count frames too, which takes a summary of the whole watch.
        """
        counts = {}
        if with_frames and self.watcher is not None:
            counts = {source.name: source.frames for source in self.watcher.summary().sources}
        with self._lock:
            return [self._status(name, line, counts.get(name, FrameCounts())) for name, line in self._lines.items()]

    def _status(self, name: str, line: _Line, frames: FrameCounts) -> CameraStatus:
        reader = line.camera.reader
        by_kind = {event.kind: event for event in line.open_events.values()}
        condition, drift = by_kind.get(EventKind.CAMERA), by_kind.get(EventKind.DRIFT)
        anomaly = by_kind.get(EventKind.ANOMALY)
        return CameraStatus(
            name=name,
            address=reader.source.shown,
            state=reader.state.value,
            description=reader.description,
            condition="" if condition is None else condition.condition,
            condition_detail="" if condition is None else condition.detail,
            drift="" if drift is None else drift.condition,
            drift_detail="" if drift is None else drift.detail,
            anomaly=None if anomaly is None else anomaly.id,
            events=line.events,
            fps=_rate(line.decided_s, self._clock()),
            latest=line.latest,
            frames=frames,
            reconnects=reader.reconnects,
            notice=line.notice,
            capture_to_decision=line.latency.summarise(),
        )


def _rate(decided_s: Sequence[float], now_s: float) -> float:
    """Decisions per second over the last ten seconds, or since the first that is kept."""
    recent = sum(1 for moment_s in decided_s if now_s - moment_s <= _FPS_WINDOW_S)
    if recent < 2 or len(decided_s) > recent:
        return recent / _FPS_WINDOW_S
    window_s = now_s - decided_s[0]
    return (recent - 1) / window_s if window_s > 0.0 else 0.0
