"""What changes, as server-sent events: one picture of the watch at most twice a second, shared by all who listen."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from meliad_edge import strict_json
from meliad_edge.device_threshold import LiveThreshold
from meliad_edge.event_store import EventStore, StoredEvent
from meliad_edge.monitor.board import Board
from meliad_edge.monitor.web.cameras import camera_state
from meliad_edge.monitor.web.events import event_as_it_stands
from meliad_edge.monitor.web.streams import Streams

_logger = logging.getLogger(__name__)

_INTERVAL_S = 0.5
_HEARTBEAT_S = 5.0
_WATCHED_EVENTS = 20
# The highest score of a second is final only when the next one has begun.
_LATEST_POINTS_S = 2.0


@dataclass(frozen=True, slots=True)
class _Picture:
    """The watch at one moment.

    Attributes:
        taken_s: When, monotonic clock.
        state: Cameras, scores and threshold, as JSON.
        events: The newest events as JSON by id, newest first.
    """

    taken_s: float
    state: str = "{}"
    events: dict[str, str] = field(default_factory=dict)


class Updates:
    """Tells listeners what is new to each of them; one who is slow is told less often, nothing is queued.

    Args:
        board: Cameras and scores.
        threshold: In force.
        store: Where events are kept, if they are.
        clock: Monotonic seconds.
        wall_clock: Seconds since 1970.
    """

    def __init__(
        self,
        board: Board,
        threshold: LiveThreshold,
        store: EventStore | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._board = board
        self._threshold = threshold
        self._store = store
        self._clock = clock
        self._wall_clock = wall_clock
        self._picture: _Picture | None = None
        self._taking: asyncio.Task[_Picture] | None = None

    async def messages(self, streams: Streams) -> AsyncIterator[bytes]:
        """Server-sent events without an end.

        Each ``data`` is a JSON object with ``time_s``, seconds since 1970, and what has changed since the message
        before: ``state`` (cameras, the last points of their score histories, the threshold), ``events``, or both. The
        first one has no events: whoever listens asks for them then. One comes at least every 5 s.

        Args:
            streams: Ends it.
        """
        told = await self._look()
        sent_s = self._clock()
        yield self._message(f'"state":{told.state}')
        while await streams.pause(_INTERVAL_S):
            picture = await self._look()
            events = [text for event_id, text in picture.events.items() if told.events.get(event_id) != text]
            changes = [f'"events":[{",".join(events)}]'] if events else []
            if picture.state != told.state:
                changes.append(f'"state":{picture.state}')
            if changes or self._clock() - sent_s >= _HEARTBEAT_S:
                yield self._message(*changes)
                sent_s = self._clock()
            told = picture

    def _message(self, *members: str) -> bytes:
        time_s = f'"time_s":{self._wall_clock():.3f}'
        return f"data: {{{','.join([time_s, *members])}}}\n\n".encode()

    async def _look(self) -> _Picture:
        """The picture of now, or one that is not older than the interval."""
        if self._picture is not None and self._clock() - self._picture.taken_s < 0.9 * _INTERVAL_S:
            return self._picture
        if self._taking is None:
            self._taking = asyncio.create_task(run_in_threadpool(self._take))
        try:
            self._picture = await asyncio.shield(self._taking)
        finally:
            if self._taking is not None and self._taking.done():
                self._taking = None
        return self._picture

    def _take(self) -> _Picture:
        taken_s = self._clock()
        cameras = []
        for number, status in enumerate(self._board.statuses(with_frames=False)):
            latest_s = 0.0 if status.latest is None else status.latest.frame.captured_wall_s
            points = self._board.scores(status.name, since_s=latest_s - _LATEST_POINTS_S)
            latest = [[point.time_s, point.score, point.threshold] for point in points]
            cameras.append({**camera_state(number, status).model_dump(), "points": latest})
        state = {"cameras": cameras, "threshold": self._threshold.calibration.threshold}
        events = {stored.id: event_as_it_stands(stored).model_dump_json() for stored in self._newest_events()}
        return _Picture(taken_s, strict_json.dumps(state), events)

    def _newest_events(self) -> list[StoredEvent]:
        if self._store is None:
            return []
        try:
            return self._store.events(limit=_WATCHED_EVENTS)
        except sqlite3.Error as error:
            _logger.warning("events cannot be read: %s", error)
            return []
