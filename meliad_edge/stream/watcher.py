"""The frame loop: sources take turns on one model, scores become events, and everything is counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from itertools import count
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meliad_edge.errors import MeliadError
from meliad_edge.events import SINGLE_IMAGE_WINDOW, STREAM_WINDOW, Event, EventState, EventTracker, Window
from meliad_edge.monitor.latency import LatencyRecorder, LatencySummary
from meliad_edge.runtime.predictor import Prediction
from meliad_edge.stream.capture import OPEN_TIMEOUT_S
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.reader import Reader, ReaderState

# A reader may be inside a call of the decoder that only its own timeout ends.
_CLOSE_TIMEOUT_S = OPEN_TIMEOUT_S + 1.0


class Scorer(Protocol):
    """Whatever decides on a frame."""

    def predict(self, image: NDArray[np.uint8]) -> Prediction:
        """Score one RGB image, uint8 [H, W, 3] of any size."""
        ...


@dataclass(frozen=True, slots=True)
class FrameCounts:
    """What became of frames.

    Attributes:
        read: Decoded; each was scored, dropped, stale, or still waiting when the watch stopped.
        scored: Decided on.
        dropped: Of a live source, replaced by a newer one before their turn.
        stale: Too old when their turn came.
        bad: Frames or pictures that could not be decoded.
    """

    read: int = 0
    scored: int = 0
    dropped: int = 0
    stale: int = 0
    bad: int = 0


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
        latencies: By stage: ``frame_to_decision`` (a decoded frame is taken up until its events are known), of
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
    """One source in the frame loop."""

    reader: Reader
    tracker: EventTracker
    scored: int = 0
    events: int = 0
    is_finished: bool = False


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
    """Scores the frames of several sources in turn; all of it happens in the thread that calls :meth:`run`.

    Args:
        predictor: Decides on a frame.
        readers: The sources, not started.
        window: When an anomaly of a stream becomes an event; every picture of a folder is an event of its own.
        on_event: Takes every state change; must not wait.
        on_notice: Takes the name of a source and a fact about it.
        on_failure: Takes the name of a source that is given up, and why.
        on_frame: Called after every decision.
        clock: Monotonic seconds, the clock of the readers.
    """

    def __init__(
        self,
        predictor: Scorer,
        readers: Sequence[Reader],
        *,
        window: Window = STREAM_WINDOW,
        on_event: Callable[[Event], None],
        on_notice: Callable[[str, str], None],
        on_failure: Callable[[str, MeliadError], None],
        on_frame: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        ids = count(1)
        self._watched = [
            _Watched(reader, EventTracker(window if reader.is_sequence else SINGLE_IMAGE_WINDOW, ids=ids))
            for reader in readers
        ]
        self._predictor = predictor
        self._on_event = on_event
        self._on_notice = on_notice
        self._on_failure = on_failure
        self._on_frame = on_frame
        self._clock = clock
        self._recorders = _Recorders()
        self._ready = threading.Event()
        self._first_s = self._last_s = 0.0

    @property
    def scored(self) -> int:
        """Frames decided on so far."""
        return sum(watched.scored for watched in self._watched)

    def run(self, *, max_frames: int | None = None) -> None:
        """Watch until every source is finished, ``max_frames`` were scored, or an exception such as Ctrl-C.

        In each case the readers are stopped and open events ended before it returns or raises.
        """
        try:
            for watched in self._watched:
                watched.reader.start(self._ready)
            while not all(watched.is_finished for watched in self._watched):
                self._ready.clear()  # Before looking: what comes in while we look is not missed.
                has_scored = False
                for watched in self._watched:
                    has_scored |= self._take_turn(watched)
                    if max_frames is not None and self.scored >= max_frames:
                        return
                if not has_scored and not all(watched.is_finished for watched in self._watched):
                    self._ready.wait()
        finally:
            self._stop()

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

    def _take_turn(self, watched: _Watched) -> bool:
        """Score the next frame of one source, if there is one."""
        reader = watched.reader
        self._pass_on_notices(reader)
        if watched.is_finished:
            return False
        frame = reader.take()
        if frame is not None:
            self._score(watched, frame)
            return True
        if reader.is_finished:
            watched.is_finished = True
            self._pass_on_notices(reader)
            self._finish_event(watched)
            if reader.error is not None:
                if not isinstance(reader.error, MeliadError):
                    raise reader.error
                self._on_failure(reader.source.name, reader.error)
        return False

    def _score(self, watched: _Watched, frame: Frame) -> None:
        taken_s = self._clock()
        prediction = self._predictor.predict(frame.image)
        event = watched.tracker.update(frame, prediction)
        decided_s = self._clock()
        if self.scored == 0:
            self._first_s = taken_s
        self._last_s = decided_s
        watched.scored += 1
        if event is not None:
            watched.events += event.state is EventState.NEW
            self._on_event(event)
        if not watched.reader.is_sequence:
            self._finish_event(watched)
        recorders = self._recorders
        recorders.frame_to_decision.record(decided_s - taken_s)
        recorders.preprocess.record(prediction.times.preprocess_s)
        recorders.infer.record(prediction.times.infer_s)
        recorders.post.record(prediction.times.post_s)
        recorders.decode.record(frame.decode_s)
        recorders.capture_to_decision.record(decided_s - frame.captured_s)
        self._on_frame()

    def _finish_event(self, watched: _Watched) -> None:
        event = watched.tracker.finish()
        if event is not None:
            self._on_event(event)

    def _pass_on_notices(self, reader: Reader) -> None:
        while reader.notices:
            self._on_notice(reader.source.name, reader.notices.popleft())

    def _stop(self) -> None:
        for watched in self._watched:
            watched.reader.stop()
        for watched in self._watched:
            self._finish_event(watched)
            watched.reader.join(_CLOSE_TIMEOUT_S)


def _summarise_source(watched: _Watched) -> SourceSummary:
    reader = watched.reader
    return SourceSummary(
        name=reader.source.name,
        state=reader.state,
        frames=FrameCounts(
            read=reader.read, scored=watched.scored, dropped=reader.dropped, stale=reader.stale, bad=reader.bad
        ),
        events=watched.events,
        reconnects=reader.reconnects,
        is_truncated=reader.is_truncated,
        error=reader.error if isinstance(reader.error, MeliadError) else None,
    )
