"""Turns what is seen frame by frame into events: something that persists begins, changes and ends.

Pure: no clock, no input, no output.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from enum import Enum

from meliad_edge.errors import UsageError
from meliad_edge.runtime.predictor import Prediction, Region
from meliad_edge.stream.frames import Frame


class EventKind(Enum):
    """What an event is about."""

    ANOMALY = "anomaly"
    CAMERA = "camera"
    DRIFT = "drift"


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


@dataclass(frozen=True, slots=True)
class Moment:
    """When something was seen, by both clocks.

    Attributes:
        monotonic_s: For differences; it never jumps.
        wall_s: Seconds since 1970 as the clock of the machine said then; a clock set later does not change it.
    """

    monotonic_s: float
    wall_s: float

    @property
    def date(self) -> datetime:
        """The wall time in UTC."""
        return datetime.fromtimestamp(self.wall_s, tz=timezone.utc)


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """One state change of something that persists.

    Attributes:
        id: Names the event, sorts by time and is safe as a file name; all its state changes share it.
        kind: What it is about.
        state: What happened.
        camera: Name of what is watched.
        source: The same; for a folder or glob the name of the picture.
        started, last_seen: When it was first and last seen.
        first_frame, last_frame: Ids of these two frames; None for a camera that delivers none.
        frame: The picture that shows it, if there is one: of an anomaly, the one with the highest score so far.
        prediction: The prediction on that frame, of an anomaly.
        condition: What is wrong with a camera or its scores, in one word; ``""`` for an anomaly.
        detail: The same in one sentence, with the figures.
    """

    id: str
    kind: EventKind
    state: EventState
    camera: str
    source: str
    started: Moment
    last_seen: Moment
    first_frame: int | None
    last_frame: int | None
    frame: Frame | None
    prediction: Prediction | None = None
    condition: str = ""
    detail: str = ""

    @property
    def peak_score(self) -> float | None:
        """Highest raw score so far, of an anomaly."""
        return None if self.prediction is None else self.prediction.score

    @property
    def regions(self) -> tuple[Region, ...]:
        """Regions of the frame with the highest score."""
        return () if self.prediction is None else self.prediction.regions


NewId = Callable[[Moment], str]


def new_event_id(started: Moment) -> str:
    """An id such as ``20261126T120341.250Z-3f9c1a``: the time, and what tells events of one moment apart."""
    date = started.date
    return f"{date:%Y%m%dT%H%M%S}.{date.microsecond // 1000:03d}Z-{secrets.token_hex(3)}"


class EventTracker:
    """N-of-M hysteresis over the scored frames of one source.

    Args:
        camera: Name of what is watched.
        window: When an event begins and ends.
        new_id: Names a new event.
    """

    def __init__(self, camera: str, window: Window = STREAM_WINDOW, *, new_id: NewId = new_event_id) -> None:
        self._camera = camera
        self._needed = window.needed
        # The last frames; None stands for a normal one.
        self._recent: deque[tuple[Frame, Prediction] | None] = deque(maxlen=window.size)
        self._new_id = new_id
        self._open: Event | None = None

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
            self._open = self._begin(anomalous)
            return self._open
        if prediction.is_anomaly:
            self._open = replace(self._open, state=EventState.UPDATE, last_seen=moment_of(frame), last_frame=frame.id)
            best = self._open.peak_score
            if best is not None and prediction.score > best:
                self._open = replace(self._open, frame=frame, prediction=prediction)
                return self._open
            return None
        return None if anomalous else self.finish()

    def finish(self) -> Event | None:
        """The source ended: end the open event, if there is one, and forget the frames before."""
        self._recent.clear()
        ended, self._open = self._open, None
        return replace(ended, state=EventState.END) if ended is not None else None

    def _begin(self, anomalous: list[tuple[Frame, Prediction]]) -> Event:
        first, last = anomalous[0][0], anomalous[-1][0]
        frame, prediction = max(anomalous, key=lambda entry: entry[1].score)
        return Event(
            id=self._new_id(moment_of(first)),
            kind=EventKind.ANOMALY,
            state=EventState.NEW,
            camera=self._camera,
            source=first.source,
            started=moment_of(first),
            last_seen=moment_of(last),
            first_frame=first.id,
            last_frame=last.id,
            frame=frame,
            prediction=prediction,
        )


class ConditionTracker:
    """Turns a condition that lasts into one event: of a camera, or of the scores it gives.

    Args:
        camera: Name of what is watched.
        kind: ``CAMERA`` or ``DRIFT``.
        new_id: Names a new event.
    """

    def __init__(self, camera: str, kind: EventKind, *, new_id: NewId = new_event_id) -> None:
        self._camera = camera
        self._kind = kind
        self._new_id = new_id
        self._open: Event | None = None

    @property
    def condition(self) -> str:
        """The condition that holds now; ``""`` when all is well."""
        return "" if self._open is None else self._open.condition

    def update(self, condition: str, detail: str, seen: Moment, frame: Frame | None) -> list[Event]:
        """Take in what holds now.

        Args:
            condition: In one word, ``""`` when all is well.
            detail: In one sentence.
            seen: When.
            frame: The frame that shows it, if there is one.

        Returns:
            Nothing while the condition stays; else the end of the one before, the beginning of the next, or both.
        """
        if condition == self.condition:
            if self._open is not None:
                self._open = replace(self._open, last_seen=seen, last_frame=frame.id if frame else None)
            return []
        events = [ended for ended in [self.finish()] if ended is not None]
        if condition:
            self._open = Event(
                id=self._new_id(seen),
                kind=self._kind,
                state=EventState.NEW,
                camera=self._camera,
                source=self._camera,
                started=seen,
                last_seen=seen,
                first_frame=frame.id if frame else None,
                last_frame=frame.id if frame else None,
                frame=frame,
                condition=condition,
                detail=detail,
            )
            events.append(self._open)
        return events

    def finish(self) -> Event | None:
        """End the open event, if there is one."""
        ended, self._open = self._open, None
        return replace(ended, state=EventState.END) if ended is not None else None


def moment_of(frame: Frame) -> Moment:
    """When a frame was captured."""
    return Moment(frame.captured_s, frame.captured_wall_s)
