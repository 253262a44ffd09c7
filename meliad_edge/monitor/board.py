"""What the page and the metrics show: written by the frame loop, read by other threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from meliad_edge.events import Event, EventState
from meliad_edge.monitor.latency import LatencyRecorder, LatencySummary
from meliad_edge.stream.watcher import Camera, Decision, FrameCounts, Watcher

_KEPT_POINTS = 3600
_SUMMARISED_FRAMES = 2048


@dataclass(frozen=True, slots=True)
class ScorePoint:
    """One decision in the history of a camera.

    Attributes:
        time_s: Capture time, seconds since 1970.
        score: Raw score.
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
        state: Value of its :class:`~meliad_edge.stream.reader.ReaderState`.
        description: Size and codec.
        condition: What is wrong with the camera, in one word; ``""`` when all is well.
        drift: What is wrong with its scores, in one word; ``""`` when all is well.
        is_anomaly: Whether an anomaly event is open.
        fps: Decisions per second over the last ten seconds.
        latest: The latest decision, if there is one.
        frames: What became of its frames.
        reconnects: How often it came back.
        notice: The latest fact about it.
        capture_to_decision: Latency of the latest frames; None before the first.
    """

    name: str
    state: str
    description: str
    condition: str
    drift: str
    is_anomaly: bool
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
        self._changed = threading.Condition(self._lock)
        self.watcher: Watcher | None = None  # Set once the watch is built; it counts the frames.

    @property
    def cameras(self) -> list[str]:
        """Names of the cameras."""
        return list(self._lines)

    def record_decision(self, decision: Decision) -> None:
        """Take in a decision; called by the frame loop."""
        line = self._lines[decision.camera]
        with self._changed:
            line.latest = decision
            prediction = decision.prediction
            line.scores.append(ScorePoint(decision.frame.captured_wall_s, prediction.score, prediction.threshold))
            line.decided_s.append(self._clock())
            line.latency.record(decision.capture_to_decision_s)
            self._changed.notify_all()

    def record_event(self, event: Event) -> None:
        """Take in a state change; called by the frame loop."""
        line = self._lines[event.camera]
        with self._changed:
            if event.state is EventState.END:
                line.open_events.pop(event.id, None)
            else:
                line.open_events[event.id] = event
            self._changed.notify_all()

    def record_notice(self, camera: str, notice: str) -> None:
        """Take in a fact about a camera; called by the frame loop."""
        with self._changed:
            if (line := self._lines.get(camera)) is not None:
                line.notice = notice
                self._changed.notify_all()

    def latest(self, camera: str) -> Decision | None:
        """The latest decision on a camera, or None.

        Raises:
            KeyError: There is no such camera.
        """
        return self._lines[camera].latest

    def wait_for_decision(self, camera: str, after: Decision | None, timeout_s: float) -> Decision | None:
        """The latest decision on a camera once it is another than ``after``; None when the time is over.

        Raises:
            KeyError: There is no such camera.
        """
        line = self._lines[camera]
        with self._changed:
            is_new = self._changed.wait_for(lambda: line.latest is not after, timeout_s)
            return line.latest if is_new else None

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

    def statuses(self) -> list[CameraStatus]:
        """Every camera as it stands."""
        counts = {} if self.watcher is None else {s.name: s.frames for s in self.watcher.summary().sources}
        with self._lock:
            return [self._status(name, line, counts.get(name, FrameCounts())) for name, line in self._lines.items()]

    def _status(self, name: str, line: _Line, frames: FrameCounts) -> CameraStatus:
        reader = line.camera.reader
        now_s = self._clock()
        recent = sum(1 for decided_s in line.decided_s if now_s - decided_s <= 10.0)
        conditions = {event.kind.value: event.condition for event in line.open_events.values()}
        return CameraStatus(
            name=name,
            state=reader.state.value,
            description=reader.description,
            condition=conditions.get("camera", ""),
            drift=conditions.get("drift", ""),
            is_anomaly="anomaly" in conditions,
            fps=recent / 10.0,
            latest=line.latest,
            frames=frames,
            reconnects=reader.reconnects,
            notice=line.notice,
            capture_to_decision=line.latency.summarise(),
        )
