"""The frame loop: sources take turns on one model, scores become events, and everything is counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meliad_edge.errors import MeliadError, UsageError
from meliad_edge.events import (
    SINGLE_IMAGE_WINDOW,
    STREAM_WINDOW,
    ConditionTracker,
    Event,
    EventKind,
    EventState,
    EventTracker,
    Moment,
    NewId,
    Window,
    moment_of,
    new_event_id,
)
from meliad_edge.monitor.latency import LatencyRecorder, LatencySummary
from meliad_edge.runtime.predictor import Prediction
from meliad_edge.runtime.view import WHOLE, View
from meliad_edge.stream.capture import OPEN_TIMEOUT_S
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.reader import Reader, ReaderState

# A reader may be inside a call of the decoder that only its own timeout ends.
_CLOSE_TIMEOUT_S = OPEN_TIMEOUT_S + 1.0


# Conditions of the camera in which there is nothing to judge, whatever its monitor says.
BLIND_CONDITIONS = ("lost", "resolution")
# A camera that delivers nothing for so long is reported as lost.
_LOST_AFTER_S = 5.0


class Scorer(Protocol):
    """Whatever decides on frames."""

    def predict_all(self, views: Sequence[tuple[NDArray[np.uint8], View]]) -> list[Prediction]:
        """Score RGB images, each uint8 [H, W, 3] of any size, each with what of it is judged."""
        ...


class CameraMonitor(Protocol):
    """Whatever judges the camera rather than the part."""

    @property
    def is_fit(self) -> bool:
        """Whether what the camera shows now may be judged at all."""
        ...

    def update(self, frame: Frame) -> tuple[str, str]:
        """Take in a frame; returns the condition in one word, ``""`` when all is well, and in one sentence."""
        ...


class DriftMonitor(Protocol):
    """Whatever judges the scores rather than a frame."""

    def update(self, frame: Frame, prediction: Prediction) -> tuple[str, str]:
        """Take in a decision; returns the condition in one word, ``""`` when all is well, and in one sentence."""
        ...


@dataclass(frozen=True, slots=True)
class Camera:
    """A source, and how it is watched.

    Attributes:
        reader: The source, not started.
        view: What of a frame is judged.
        window: When an anomaly of a stream becomes an event; every picture of a folder is an event of its own.
        latency_budget_s: From capture to decision. A frame that has waited too long to be decided within it is given
            up for the next one. None sets no limit.
        monitor: Judges the camera; None does not.
        drift: Judges the scores; None does not.
    """

    reader: Reader
    view: View = WHOLE
    window: Window = STREAM_WINDOW
    latency_budget_s: float | None = None
    monitor: CameraMonitor | None = None
    drift: DriftMonitor | None = None

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.reader.source.name


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """One decided frame.

    Attributes:
        camera: Name of what is watched.
        frame: The frame.
        prediction: The decision on it.
        condition: What is wrong with the camera, in one word; ``""`` when all is well.
        frame_to_decision_s: From taking the decoded frame up to the decision.
        capture_to_decision_s: From its capture to the decision.
    """

    camera: str
    frame: Frame
    prediction: Prediction
    condition: str
    frame_to_decision_s: float
    capture_to_decision_s: float


@dataclass(frozen=True, slots=True)
class FrameCounts:
    """What became of frames.

    Attributes:
        read: Decoded; each was scored, dropped, stale, late, a misfit, or still waiting when the watch stopped.
        scored: Decided on.
        dropped: Of a live source, replaced by a newer one before their turn.
        stale: Too old when they came or when it was their turn.
        late: Given up because the latency budget could not be kept any more.
        misfit: Given up because they have not the size that the view was made for.
        missed: Decided on, but after the latency budget.
        bad: Frames or pictures that could not be decoded.
        skipped: Beyond the frame rate that is wanted; not decoded, not among those read.
    """

    read: int = 0
    scored: int = 0
    dropped: int = 0
    stale: int = 0
    late: int = 0
    misfit: int = 0
    missed: int = 0
    bad: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """What became of one source.

    Attributes:
        name: Name of the source.
        state: Its last state.
        frames: What became of its frames.
        events: Events that began.
        reconnects: How often a live source came back.
        is_truncated: Whether a video ended well before the length it announces.
        error: Why the source was given up; None otherwise.
    """

    name: str
    state: ReaderState
    frames: FrameCounts
    events: int
    reconnects: int
    is_truncated: bool
    error: MeliadError | None


@dataclass(frozen=True, slots=True)
class WatchSummary:
    """What became of a watch.

    Attributes:
        sources: One entry per source, in the order given.
        latencies: By stage: ``frame_to_decision`` (a decoded frame is taken up until its event is known), of
            which ``preprocess``, ``infer`` and ``post`` are parts; ``decode``; and ``capture_to_decision``, which
            includes the time a frame waited for its turn. Stages without a frame are absent.
        throughput_fps: Frames decided on per second, from the first frame taken up to the last decision.
    """

    sources: tuple[SourceSummary, ...]
    latencies: dict[str, LatencySummary]
    throughput_fps: float

    @property
    def frames(self) -> FrameCounts:
        """Counts of all sources together."""
        counts = [astuple(source.frames) for source in self.sources]
        return FrameCounts(*(sum(column) for column in zip(*counts, strict=True)))

    @property
    def events(self) -> int:
        """Events that began, of all sources together."""
        return sum(source.events for source in self.sources)


@dataclass(slots=True)
class _Watched:
    """One camera in the frame loop."""

    camera: Camera
    tracker: EventTracker
    condition: ConditionTracker
    drift: ConditionTracker
    scored: int = 0
    late: int = 0
    missed: int = 0
    misfits: int = 0
    events: int = 0
    is_finished: bool = False

    @property
    def reader(self) -> Reader:
        return self.camera.reader

    @property
    def is_fit(self) -> bool:
        """Whether what the camera shows now says anything of the part."""
        monitor = self.camera.monitor
        return self.condition.condition not in BLIND_CONDITIONS and (monitor is None or monitor.is_fit)


@dataclass(slots=True)
class _Recorders:
    """The stages that are timed."""

    frame_to_decision: LatencyRecorder = field(default_factory=LatencyRecorder)
    preprocess: LatencyRecorder = field(default_factory=LatencyRecorder)
    infer: LatencyRecorder = field(default_factory=LatencyRecorder)
    post: LatencyRecorder = field(default_factory=LatencyRecorder)
    decode: LatencyRecorder = field(default_factory=LatencyRecorder)
    capture_to_decision: LatencyRecorder = field(default_factory=LatencyRecorder)


class Watcher:
    """Scores the frames of several cameras in turn; all of it happens in the thread that calls :meth:`run`.

    Whoever has waited longest comes first, so that under overload every camera gets the same share; what waits at
    the same time may be scored in one batch.

    Args:
        predictor: Decides on frames.
        cameras: What is watched.
        batch_size: Most frames scored in one call of the engine; only what is waiting anyway is put together.
        on_event: Takes every state change; must not wait.
        on_notice: Takes the name of a source and a fact about it.
        on_failure: Takes the name of a source that is given up, and why.
        on_decision: Takes every decision; must not wait.
        clock: Monotonic seconds, the clock of the readers.
        wall_clock: Seconds since 1970.
        new_id: Names a new event.
    """

    def __init__(
        self,
        predictor: Scorer,
        cameras: Sequence[Camera],
        *,
        batch_size: int = 1,
        on_event: Callable[[Event], None],
        on_notice: Callable[[str, str], None],
        on_failure: Callable[[str, MeliadError], None],
        on_decision: Callable[[Decision], None] = lambda decision: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        new_id: NewId = new_event_id,
    ) -> None:
        self._watched = [
            _Watched(
                camera,
                EventTracker(
                    camera.name, camera.window if camera.reader.is_sequence else SINGLE_IMAGE_WINDOW, new_id=new_id
                ),
                ConditionTracker(camera.name, EventKind.CAMERA, new_id=new_id),
                ConditionTracker(camera.name, EventKind.DRIFT, new_id=new_id),
            )
            for camera in cameras
        ]
        self._turns = list(self._watched)  # Whoever was served longest ago comes first.
        self._predictor = predictor
        self._batch_size = batch_size
        self._on_event = on_event
        self._on_notice = on_notice
        self._on_failure = on_failure
        self._on_decision = on_decision
        self._clock = clock
        self._wall_clock = wall_clock
        self._recorders = _Recorders()
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._first_s = self._last_s = 0.0
        self._usual_s = 0.0  # How long a decision takes, from being taken up.

    @property
    def scored(self) -> int:
        """Frames decided on so far."""
        return sum(watched.scored for watched in self._watched)

    def stop(self) -> None:
        """Let :meth:`run` return after the frame that it is at; from any thread."""
        self._stopping.set()
        self._ready.set()

    def run(self, *, max_frames: int | None = None, waits_for_cameras: bool = False) -> None:
        """Watch until every source is finished, ``max_frames`` were scored, or an exception such as Ctrl-C.

        In each case the readers are stopped and open events ended before it returns or raises.

        Args:
            max_frames: None sets no limit.
            waits_for_cameras: Go on with cameras that never delivered, though nothing else does.
        """
        try:
            for watched in self._watched:
                watched.reader.start(self._ready)
            while not self._stopping.is_set():
                self._ready.clear()  # Before looking: what comes in while we look is not missed.
                left = self._batch_size if max_frames is None else min(self._batch_size, max_frames - self.scored)
                if taken := self._take_turns(left):
                    self._score(taken)
                if all(watched.is_finished for watched in self._watched):
                    return
                if not waits_for_cameras and self._is_nothing_there():
                    for watched in self._watched:
                        watched.reader.stop()
                if max_frames is not None and self.scored >= max_frames:
                    return
                if not taken:
                    self._ready.wait(1.0)  # To see also that nothing comes.
        finally:
            self._stop()

    def _is_nothing_there(self) -> bool:
        """Whether nothing delivers, and hardly will; while something does, the rest is waited for."""
        return all(watched.is_finished or watched.reader.is_in_doubt for watched in self._watched)

    def summary(self) -> WatchSummary:
        """Counters and latencies so far."""
        recorders = {name: getattr(self._recorders, name) for name in _Recorders.__slots__}
        summaries = {name: recorder.summarise() for name, recorder in recorders.items()}
        elapsed_s = self._last_s - self._first_s
        return WatchSummary(
            sources=tuple(_summarise_source(watched) for watched in self._watched),
            latencies={name: summary for name, summary in summaries.items() if summary is not None},
            throughput_fps=self.scored / elapsed_s if elapsed_s > 0.0 else 0.0,
        )

    def _take_turns(self, most: int) -> list[tuple[_Watched, Frame]]:
        """The next frame of as many cameras as may be scored together, at most one of each."""
        taken = []
        for watched in list(self._turns):
            frame = self._next_frame(watched)
            if frame is not None:
                taken.append((watched, frame))
                self._turns.remove(watched)
                self._turns.append(watched)
                if len(taken) == most:
                    break
        return taken

    def _next_frame(self, watched: _Watched) -> Frame | None:
        reader = watched.reader
        self._pass_on_notices(reader)
        if watched.is_finished:
            return None
        frame = reader.take()
        if frame is not None:
            if self._is_late(watched.camera, frame):
                watched.late += 1
                return None
            return frame if self._fits(watched, frame) else None
        if reader.is_finished:
            self._finish(watched)
        elif reader.source.is_live or reader.state is ReaderState.WAITING:
            if self._clock() - reader.alive_s > _LOST_AFTER_S:
                self._see_condition(watched, "lost", f"no picture for {_LOST_AFTER_S:g} s ({reader.state.value})", None)
        elif watched.condition.condition == "lost":
            self._see_condition(watched, "", "", None)  # A folder is back before its next picture comes.
        return None

    def _fits(self, watched: _Watched, frame: Frame) -> bool:
        """Whether the view can be cut from a frame; a camera whose resolution changed says so and is not judged."""
        if watched.camera.view is WHOLE:
            return True
        try:
            watched.camera.view.area((frame.image.shape[0], frame.image.shape[1]))
        except UsageError as error:
            watched.misfits += 1
            self._see_condition(watched, "resolution", str(error), frame)
            return False
        return True

    def _is_late(self, camera: Camera, frame: Frame) -> bool:
        """Whether a frame has waited so long that its budget cannot be kept; a budget that never can sheds nothing."""
        budget_s = camera.latency_budget_s
        if budget_s is None or self._usual_s >= budget_s:
            return False
        return self._clock() - frame.captured_s + self._usual_s > budget_s

    def _score(self, taken: Sequence[tuple[_Watched, Frame]]) -> None:
        taken_s = self._clock()
        if self.scored == 0:
            self._first_s = taken_s
        predictions = self._predictor.predict_all([(frame.image, watched.camera.view) for watched, frame in taken])
        for (watched, frame), prediction in zip(taken, predictions, strict=True):
            self._decide(watched, frame, prediction, taken_s)
        elapsed_s = self._last_s - taken_s
        self._usual_s = elapsed_s if self._usual_s == 0.0 else 0.9 * self._usual_s + 0.1 * elapsed_s

    def _decide(self, watched: _Watched, frame: Frame, prediction: Prediction, taken_s: float) -> None:
        camera = watched.camera
        condition, detail = ("", "") if camera.monitor is None else camera.monitor.update(frame)
        self._see_condition(watched, condition, detail, frame)
        # What a blind camera shows says nothing of the part.
        event = None
        if watched.is_fit:
            event = watched.tracker.update(frame, prediction)
            if camera.drift is not None:
                condition, detail = camera.drift.update(frame, prediction)
                for change in watched.drift.update(condition, detail, moment_of(frame), frame):
                    self._on_event(change)
        decided_s = self._last_s = self._clock()
        watched.scored += 1
        waited_s = decided_s - frame.captured_s
        watched.missed += camera.latency_budget_s is not None and waited_s > camera.latency_budget_s
        if event is not None:
            watched.events += event.state is EventState.NEW
            self._on_event(event)
        if not watched.reader.is_sequence:
            self._end_anomaly(watched)
        recorders = self._recorders
        recorders.frame_to_decision.record(decided_s - taken_s)
        recorders.preprocess.record(prediction.times.preprocess_s)
        recorders.infer.record(prediction.times.infer_s)
        recorders.post.record(prediction.times.post_s)
        recorders.decode.record(frame.decode_s)
        recorders.capture_to_decision.record(waited_s)
        self._on_decision(
            Decision(camera.name, frame, prediction, watched.condition.condition, decided_s - taken_s, waited_s)
        )

    def _see_condition(self, watched: _Watched, condition: str, detail: str, frame: Frame | None) -> None:
        seen = moment_of(frame) if frame is not None else Moment(self._clock(), self._wall_clock())
        for event in watched.condition.update(condition, detail, seen, frame):
            if event.state is EventState.NEW:
                self._on_notice(watched.camera.name, detail)
            self._on_event(event)
            if event.state is EventState.NEW and not watched.is_fit:
                self._end_anomaly(watched)

    def _end_anomaly(self, watched: _Watched) -> None:
        event = watched.tracker.finish()
        if event is not None:
            self._on_event(event)

    def _finish(self, watched: _Watched) -> None:
        """A source is at its end, or is given up."""
        reader = watched.reader
        watched.is_finished = True
        self._pass_on_notices(reader)
        self._end_anomaly(watched)
        if reader.error is not None:
            if reader.source.is_live:
                self._see_condition(watched, "lost", str(reader.error), None)
            self._on_failure(reader.source.name, reader.error)

    def _pass_on_notices(self, reader: Reader) -> None:
        while reader.notices:
            self._on_notice(reader.source.name, reader.notices.popleft())

    def _stop(self) -> None:
        for watched in self._watched:
            watched.reader.stop()
        for watched in self._watched:
            self._end_anomaly(watched)
            for tracker in (watched.condition, watched.drift):
                if (event := tracker.finish()) is not None:
                    self._on_event(event)
            reader = watched.reader
            reader.join(_CLOSE_TIMEOUT_S)
            if not watched.is_finished and reader.error is not None:
                self._on_failure(reader.source.name, reader.error)


def _summarise_source(watched: _Watched) -> SourceSummary:
    reader = watched.reader
    return SourceSummary(
        name=reader.source.name,
        state=reader.state,
        frames=FrameCounts(
            read=reader.read + reader.old_on_arrival,
            scored=watched.scored,
            dropped=reader.dropped,
            stale=reader.stale + reader.old_on_arrival,
            late=watched.late,
            misfit=watched.misfits,
            missed=watched.missed,
            bad=reader.bad,
            skipped=reader.skipped,
        ),
        events=watched.events,
        reconnects=reader.reconnects,
        is_truncated=reader.is_truncated,
        error=reader.error,
    )
