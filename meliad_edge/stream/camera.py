"""Live sources: the newest frame only, and a connection that comes back."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

from meliad_edge.stream.backoff import Backoff
from meliad_edge.stream.capture import Capture, VideoCapture, open_capture
from meliad_edge.stream.failures import Failure, FailureKind
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.reader import Reader, ReaderState
from meliad_edge.stream.uri import SourceUri

MAX_AGE_S = 2.0
FIRST_ATTEMPTS = 5


class CameraReader(Reader):
    """Keeps the newest frame of a camera, and connects again when the camera is lost.

    A camera that never delivered is given up at once when the address or the codec is wrong, and after
    ``FIRST_ATTEMPTS`` otherwise. One that did deliver is tried for ever, except when it refuses the
    credentials: cameras lock accounts that go on trying.

    Args:
        source: The camera.
        clock: Monotonic seconds.
        max_fps: Most frames per second that are handed over; the rest is skipped before its colours are converted.
        max_age_s: A frame older than this is not scored. The age counts from the decoder: what waited in
            the camera or the network before cannot be known.
        random_source: Jitter of the back-off.
        wait: Waits for a delay in seconds; returns whether the reader is to stop. None waits in real time.
        connect: Opens the camera.
    """

    def __init__(
        self,
        source: SourceUri,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_fps: float | None = None,
        max_age_s: float = MAX_AGE_S,
        random_source: random.Random | None = None,
        wait: Callable[[float], bool] | None = None,
        connect: Callable[[SourceUri], VideoCapture | Failure] = open_capture,
    ) -> None:
        super().__init__(source, clock=clock)
        self._interval_s = 0.0 if max_fps is None else 1.0 / max_fps
        self._due_s = -math.inf
        self._max_age_s = max_age_s
        self._backoff = Backoff(random_source or random.Random())
        self._wait = wait or self._stopping.wait
        self._connect = connect
        self._next_id = 0

    def take(self) -> Frame | None:
        """The newest frame, or None when there is none, or only one that is too old."""
        frame = super().take()
        if frame is not None and self._clock() - frame.captured_s > self._max_age_s:
            self.stale += 1
            return None
        return frame

    def _read_frames(self) -> None:
        attempts = 0
        while not self._stopping.is_set():
            self.state = ReaderState.CONNECTING
            video = self._connect(self.source)
            if isinstance(video, Failure):
                attempts += 1
                failure = video
                if self._is_final(failure, attempts):
                    raise failure.to_error(self.source)
            else:
                failure = self._stream(video)
                attempts = 0
            if self._stopping.is_set():
                return
            delay_s = self._backoff.next_delay_s()
            self.state = ReaderState.WAITING
            self._notify(f"{failure.detail}; connecting again in {delay_s:.1f} s")
            if self._wait(delay_s):
                return

    def _is_due(self, decoded_s: float) -> bool:
        """Whether the frame rate that is wanted allows a frame; on average it is reached, whatever the camera's is."""
        if decoded_s < self._due_s:
            return False
        self._due_s = max(self._due_s, decoded_s - self._interval_s) + self._interval_s
        return True

    def _is_final(self, failure: Failure, attempts: int) -> bool:
        if failure.kind is FailureKind.AUTH:
            return True
        if self.read > 0:
            return False
        return failure.kind in (FailureKind.NOT_FOUND, FailureKind.CODEC) or attempts >= FIRST_ATTEMPTS

    def _stream(self, video: VideoCapture) -> Failure:
        """Deliver frames until the connection is lost; returns why it was."""
        try:
            self.state = ReaderState.STREAMING
            self.reconnects += self.read > 0
            self.description = video.description
            self._notify(f"connected, {video.description}")
            while not self._stopping.is_set():
                captured = video.read(self._is_due)
                if captured is None:
                    self.skipped += 1
                elif isinstance(captured, Capture):
                    self._backoff.reset()
                    decode_s = captured.finished_s - captured.decoded_s
                    self._put(Frame(self.source.name, self._next_id, captured.decoded_s, captured.image, decode_s))
                elif captured.kind is FailureKind.CODEC:
                    self.bad += 1
                else:
                    return captured
                self._next_id += 1
        finally:
            video.close()
        return Failure(FailureKind.ENDED, "closed")
