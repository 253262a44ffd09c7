"""What all sources have in common: a thread that reads, a buffer it fills, a state, and counters."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from enum import Enum

from meliad_edge.errors import MeliadError
from meliad_edge.stream.frames import Frame, FrameBuffer
from meliad_edge.stream.uri import SourceUri, redact

_logger = logging.getLogger(__name__)

_PREFETCHED_FRAMES = 4


class ReaderState(Enum):
    """Where a reader is in its life; ENDED and FAILED are final.

    CONNECTING ─▶ STREAMING ─▶ ENDED          nothing more to read, or closed
        ▲  │          │
        │  ├──────────┼──────▶ FAILED         given up, see ``error``
        │  ▼          ▼
        └─ WAITING ◀──┘                       a camera or a folder that is followed: lost, tried again
    """

    CONNECTING = "connecting"
    STREAMING = "streaming"
    WAITING = "waiting"
    ENDED = "ended"
    FAILED = "failed"


class Reader(ABC):
    """Reads one source in a thread of its own.

    The frame loop takes frames without waiting; ``ready`` is set whenever there is a reason to look again.

    Attributes:
        source: What is read.
        state: See :class:`ReaderState`.
        error: Why the reader failed; None otherwise. Its cause is a bug of ours, if that was why.
        notices: Facts for people, oldest first, taken out by the frame loop.
        total: Frames the source announces, once that is known.
        alive_s: When a frame came last that is not too old, handed over or not; monotonic clock.
        read: Frames decoded and handed over so far.
        bad: Frames or pictures that could not be decoded.
        stale: Frames that were too old when their turn came.
        old_on_arrival: Frames of a live source that were too old when they came, and not handed over.
        skipped: Frames of a live source beyond the frame rate that is wanted.
        description: Size and codec of the pictures, once they are known.
        reconnects: How often a live source came back.
        is_in_doubt: Whether a live source never delivered and hardly will; it is still tried, and fails when stopped.
        is_truncated: Whether a video ended well before the length it announces.
    """

    def __init__(self, source: SourceUri, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.source = source
        self.state = ReaderState.CONNECTING
        self.error: MeliadError | None = None
        self.notices: deque[str] = deque()
        self.total: int | None = None
        self.read = self.bad = self.stale = self.old_on_arrival = self.skipped = self.reconnects = 0
        self.description = ""
        self.is_in_doubt = False
        self.is_truncated = False
        self.alive_s = clock()
        self._clock = clock
        self._buffer = (
            FrameBuffer(1, lossless=False) if source.is_live else FrameBuffer(_PREFETCHED_FRAMES, lossless=True)
        )
        self._stopping = threading.Event()
        self._ready = threading.Event()
        # A daemon, so that a decoder that hangs cannot keep the process alive for ever; join() waits for it first.
        self._thread = threading.Thread(target=self._run, name=f"read {source.name}", daemon=True)

    @property
    def is_sequence(self) -> bool:
        """Whether consecutive frames show the same scene, so that an anomaly must persist to become an event."""
        return True

    @property
    def is_finished(self) -> bool:
        """Whether no further frame will come."""
        return self.state in (ReaderState.ENDED, ReaderState.FAILED) and not len(self._buffer)

    @property
    def dropped(self) -> int:
        """Frames of a live source that were replaced by a newer one before their turn."""
        return self._buffer.dropped

    def start(self, ready: threading.Event) -> None:
        """Begin to read.

        Args:
            ready: Set whenever a frame, a notice or a new state is there.
        """
        self._ready = ready
        self.alive_s = self._clock()
        self._thread.start()

    def take(self) -> Frame | None:
        """The next frame to score, or None when there is none now; never waits."""
        return self._buffer.take()

    def stop(self) -> None:
        """Ask the thread to end; does not wait for it."""
        self._stopping.set()
        self._buffer.close()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end, if it was started."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    @abstractmethod
    def _read_frames(self) -> None:
        """Read until the source ends or :attr:`_stopping` is set; runs in the thread of the reader."""

    def _run(self) -> None:
        try:
            self._read_frames()
        except MeliadError as error:
            self._fail(error)
        except Exception as error:  # A bug, or a library's; the other cameras are watched all the same.
            _logger.error("%s", redact("".join(traceback.format_exception(error))))
            failure = MeliadError(f"{self.source.shown}: failed with an unexpected {type(error).__name__}; report it")
            failure.__cause__ = error
            self._fail(failure)
        else:
            self.state = ReaderState.ENDED
        self._ready.set()

    def _fail(self, error: MeliadError) -> None:
        self.error = error
        self.state = ReaderState.FAILED

    def _put(self, frame: Frame) -> bool:
        """Hand over a frame; False when the reader was closed."""
        if not self._buffer.put(frame):
            return False
        self.read += 1
        self.alive_s = frame.captured_s
        self._ready.set()
        return True

    def _notify(self, notice: str) -> None:
        self.notices.append(notice)
        self._ready.set()
