"""Turns the scores of consecutive frames into events: an anomaly that persists begins, changes and ends.

Pure: no clock, no input, no output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import count

from meliad_edge.errors import UsageError
from meliad_edge.runtime.predictor import Prediction, Region
from meliad_edge.stream.frames import Frame


class EventState(Enum):
    """What happened to an event."""

    NEW = "new"
    UPDATE = "update"
    END = "end"


@dataclass(frozen=True, slots=True)
class Window:
    """An event begins when ``needed`` of the last ``size`` frames are anomalous, and ends after ``size`` normal ones.

    Raises:
        UsageError: Not 1 <= needed <= size.
    """

    needed: int
    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.needed <= self.size:
            msg = f"window {self.needed}/{self.size}: N of M frames needs 1 <= N <= M; try 3/5"
            raise UsageError(msg)


STREAM_WINDOW = Window(3, 5)
SINGLE_IMAGE_WINDOW = Window(1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """One state change of an anomaly that persists.

    Attributes:
        id: Number of the event; all its state changes share it.
        state: What happened.
        source: Name of the source.
        first_frame, last_frame: Ids of the first and the latest anomalous frame so far.
        started_s, last_seen_s: Capture times of these two, monotonic clock.
        frame: The frame with the highest score so far.
        prediction: The prediction on that frame.
    """

    id: int
    state: EventState
    source: str
    first_frame: int
    last_frame: int
    started_s: float
    last_seen_s: float
    frame: Frame
    prediction: Prediction

    @property
    def peak_score(self) -> float:
        """Highest raw score so far."""
        return self.prediction.score

    @property
    def regions(self) -> tuple[Region, ...]:
        """Regions of the frame with the highest score."""
        return self.prediction.regions


@dataclass(slots=True)
class _Open:
    """An event that has begun and not ended."""

    id: int
    first: Frame
    last: Frame
    best: tuple[Frame, Prediction]

    def to_event(self, state: EventState) -> Event:
        return Event(
            id=self.id,
            state=state,
            source=self.first.source,
            first_frame=self.first.id,
            last_frame=self.last.id,
            started_s=self.first.captured_s,
            last_seen_s=self.last.captured_s,
            frame=self.best[0],
            prediction=self.best[1],
        )


class EventTracker:
    """N-of-M hysteresis over the scored frames of one source.

    Args:
        window: When an event begins and ends.
        ids: Where event numbers come from; shared by the trackers of several sources.
    """

    def __init__(self, window: Window = STREAM_WINDOW, *, ids: Iterator[int] | None = None) -> None:
        self._needed = window.needed
        # The last frames; None stands for a normal one.
        self._recent: deque[tuple[Frame, Prediction] | None] = deque(maxlen=window.size)
        self._ids = ids if ids is not None else count(1)
        self._open: _Open | None = None

    def update(self, frame: Frame, prediction: Prediction) -> Event | None:
        """Take in the next scored frame.

        Returns:
            A new event, an update because the frame has the highest score of its event so far, the end of
            an event, or None.
        """
        self._recent.append((frame, prediction) if prediction.is_anomaly else None)
        anomalous = [entry for entry in self._recent if entry is not None]
        if self._open is None:
            if len(anomalous) < self._needed:
                return None
            best = max(anomalous, key=lambda entry: entry[1].score)
            self._open = _Open(next(self._ids), first=anomalous[0][0], last=anomalous[-1][0], best=best)
            return self._open.to_event(EventState.NEW)
        if prediction.is_anomaly:
            self._open.last = frame
            if prediction.score > self._open.best[1].score:
                self._open.best = (frame, prediction)
                return self._open.to_event(EventState.UPDATE)
            return None
        return None if anomalous else self.finish()

    def finish(self) -> Event | None:
        """The source ended: end the open event, if there is one, and forget the frames before."""
        self._recent.clear()
        ended, self._open = self._open, None
        return ended.to_event(EventState.END) if ended is not None else None
