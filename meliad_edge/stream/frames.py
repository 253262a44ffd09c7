"""One frame of a source, and the bounded buffer through which a reader thread hands frames over."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One picture that a source really delivered.

    Attributes:
        source: Name of the source; for a folder or glob the name of the picture.
        id: Counts what the source delivered, from 0, and never goes back: a gap is a frame that was dropped
            or could not be decoded.
        captured_s: When it was captured, monotonic clock. A live frame: when it came out of the decoder.
            A frame of a file: when reading it began.
        image: uint8 RGB [H, W, 3].
        decode_s: Decoding and conversion to RGB; for a live source the conversion alone, because
            there decoding cannot be told from waiting for the camera.
        captured_wall_s: The same moment by the machine's clock, seconds since 1970.
    """

    source: str
    id: int
    captured_s: float
    image: NDArray[np.uint8] = field(repr=False)
    decode_s: float
    captured_wall_s: float = field(default_factory=time.time)


class FrameBuffer:
    """Hands frames from a reader thread to the frame loop, in bounded memory.

    Args:
        capacity: Most frames held.
        lossless: When full, make the reader wait; otherwise the newest frame replaces the oldest,
            and the loss is counted.
    """

    def __init__(self, capacity: int, *, lossless: bool) -> None:
        self._capacity = capacity
        self._lossless = lossless
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: Frame) -> bool:
        """Add a frame; False once the buffer is closed."""
        with self._changed:
            if self._lossless:
                self._changed.wait_for(lambda: self._closed or len(self._frames) < self._capacity)
            elif len(self._frames) == self._capacity:
                self._frames.popleft()
                self.dropped += 1
            if self._closed:
                return False
            self._frames.append(frame)
            return True

    def take(self) -> Frame | None:
        """Remove and return the oldest frame; None when there is none now."""
        with self._changed:
            if not self._frames:
                return None
            frame = self._frames.popleft()
            self._changed.notify()
            return frame

    def close(self) -> None:
        """Let go of a waiting reader; frames put from now on are refused."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
