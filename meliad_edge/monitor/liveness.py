"""Whether the frame loop still takes frames up, for whoever restarts a watch that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from meliad_edge.monitor.board import Board
from meliad_edge.stream.watcher import FrameCounts

# Longer than any decision on any device, building up the engine's memory on the first one included.
STALLED_AFTER_S = 30.0
# Counting frames summarises the whole watch, which nobody may have done in a loop.
_SHORTEST_INTERVAL_S = 1.0


class Liveness:
    """Notices that frames wait and none is taken up, from being asked now and then; a lost camera is no stall.

    Args:
        board: What counts the frames.
        clock: Monotonic seconds.
    """

    def __init__(self, board: Board, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._board = board
        self._clock = clock
        self._lock = threading.Lock()
        self._asked_s: float | None = None
        self._taken_up = 0
        self._waiting_since_s: float | None = None

    def stalled_s(self) -> float:
        """How long frames have been seen to wait while none was taken up; 0.0 when all is well."""
        with self._lock:
            now_s = self._clock()
            if self._asked_s is None or now_s - self._asked_s >= _SHORTEST_INTERVAL_S:
                self._asked_s = now_s
                self._look(now_s)
            return 0.0 if self._waiting_since_s is None else now_s - self._waiting_since_s

    @property
    def is_alive(self) -> bool:
        """Whether the frame loop makes progress, or has nothing to do."""
        return self.stalled_s() <= STALLED_AFTER_S

    def _look(self, now_s: float) -> None:
        counts = [status.frames for status in self._board.statuses()]
        taken_up = sum(_taken_up(frames) for frames in counts)
        waiting = sum(frames.read - frames.dropped - _taken_up(frames) for frames in counts)
        if waiting <= 0 or taken_up != self._taken_up:
            self._waiting_since_s = None
        elif self._waiting_since_s is None:
            self._waiting_since_s = now_s
        self._taken_up = taken_up


def _taken_up(frames: FrameCounts) -> int:
    return frames.scored + frames.stale + frames.late + frames.misfit
