"""Live sources: the newest frame only, and a connection that comes back."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

from meliad_edge.stream.backoff import Backoff
from meliad_edge.stream.capture import Capture, Grab, VideoCapture, open_capture
from meliad_edge.stream.capture_clock import CaptureClock
from meliad_edge.stream.failures import Failure, FailureKind
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.reader import Reader, ReaderState
from meliad_edge.stream.uri import SourceUri

MAX_AGE_S = 2.0
FIRST_ATTEMPTS = 5
# An attempt gives the password twice, once for OpenCV and once to find out why; cameras lock an account after some
# seven refusals in half an hour.
AUTH_DELAY_S = 600.0
# After so long with nothing but frames that are too old, what is piled up is thrown away by connecting again.
_STALE_FOR_S = 6.0


class CameraReader(Reader):
    """Keeps the newest frame of a camera, and connects again when the camera is lost.

    It is tried for ever, except when it refuses the credentials before it ever delivered: cameras lock accounts that go
    on trying. One that delivered may refuse them while it starts, and is tried again ``AUTH_DELAY_S`` later. One that
    never delivered is in doubt, at once when the address is wrong, and after ``FIRST_ATTEMPTS`` otherwise: a server may
    describe a stream that is still being set up or torn down. It may be that it is switched on later than we are, so
    that is for the frame loop to decide, which knows whether anything else delivers.

    Args:
        source: The camera.
        clock: Monotonic seconds.
        wall_clock: Seconds since 1970.
        max_fps: Most frames per second that are handed over; the rest is skipped before its colours are converted.
        max_age_s: A frame older than this is not scored. Of an RTSP camera the age counts from the timestamp of the
            picture, less the constant time that even the quickest is under way; of others from the decoder. A camera
            whose pictures stay too old is connected to again, so that what is piled up goes away.
        backoff: How long between attempts; None takes the usual one.
        wait: Waits for a delay in seconds; returns whether the reader is to stop. None waits in real time.
        connect: Opens the camera.
    """

    def __init__(
        self,
        source: SourceUri,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        max_fps: float | None = None,
        max_age_s: float = MAX_AGE_S,
        backoff: Backoff | None = None,
        wait: Callable[[float], bool] | None = None,
        connect: Callable[[SourceUri], VideoCapture | Failure] = open_capture,
    ) -> None:
        super().__init__(source, clock=clock)
        self._wall_clock = wall_clock
        self._interval_s = 0.0 if max_fps is None else 1.0 / max_fps
        self._due_s = -math.inf
        self._max_age_s = max_age_s
        self._backoff = backoff or Backoff(random.Random())
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
                self.is_in_doubt = self._is_doubtful(failure, attempts)
            else:
                attempts = 0
                self.is_in_doubt = False
                failure = self._stream(video)
            is_refused = failure.kind is FailureKind.AUTH
            if is_refused and self.read == 0:
                raise failure.to_error(self.source)
            if not self._stopping.is_set():
                delay_s = AUTH_DELAY_S if is_refused else self._backoff.next_delay_s()
                self.state = ReaderState.WAITING
                self._notify(f"{failure.detail}; connecting again in {delay_s:.1f} s")
                if not self._wait(delay_s):
                    continue
            if self.is_in_doubt:
                raise failure.to_error(self.source)
            return

    def _is_doubtful(self, failure: Failure, attempts: int) -> bool:
        return self.read == 0 and (failure.kind is FailureKind.NOT_FOUND or attempts >= FIRST_ATTEMPTS)

    def _stream(self, video: VideoCapture) -> Failure:
        """Deliver frames until the connection is lost; returns why it was."""
        moments = _Moments(self._max_age_s)
        try:
            self.state = ReaderState.STREAMING
            self.reconnects += self.read > 0
            self.description = video.description
            self._notify(f"connected, {video.description}")
            while not self._stopping.is_set():
                captured = video.read(lambda grab: self._is_wanted(moments, grab))
                if isinstance(captured, Capture):
                    self._backoff.reset()
                    self._put(self._frame(captured, moments.captured_s))
                elif captured is not None and captured.kind is FailureKind.CODEC:
                    self.bad += 1
                elif captured is not None:
                    return captured
                elif moments.stale_for_s > _STALE_FOR_S:
                    return Failure(FailureKind.TIMEOUT, f"pictures come more than {self._max_age_s:g} s late")
                self._next_id += 1
        finally:
            video.close()
        return Failure(FailureKind.ENDED, "closed")

    def _frame(self, captured: Capture, captured_s: float) -> Frame:
        return Frame(
            self.source.name,
            self._next_id,
            captured_s,
            captured.image,
            decode_s=captured.finished_s - captured.decoded_s,
            captured_wall_s=self._wall_clock() - (captured.finished_s - captured_s),
        )

    def _is_wanted(self, moments: _Moments, grab: Grab) -> bool:
        """Whether a frame in the decoder is fresh, and due at the frame rate that is wanted."""
        if not moments.place(grab):
            self.old_on_arrival += 1
            return False
        if moments.captured_s < self._due_s:
            self.skipped += 1
            self.alive_s = moments.captured_s
            return False
        # On average the rate is reached, whatever that of the camera is.
        self._due_s = max(self._due_s, moments.captured_s - self._interval_s) + self._interval_s
        return True


class _Moments:
    """When the frames of one connection were captured.

    Attributes:
        captured_s: Of the latest, monotonic clock.
        stale_for_s: For how long nothing but frames that are too old has come.
    """

    def __init__(self, max_age_s: float) -> None:
        self._clock = CaptureClock()
        self._max_age_s = max_age_s
        self._stale_since_s: float | None = None
        self.captured_s = self.stale_for_s = 0.0

    def place(self, grab: Grab) -> bool:
        """Find out when a frame was captured; False when it is too old, or was piled up before the connection."""
        captured_s: float | None = grab.decoded_s
        if grab.stream_s is not None:
            captured_s = self._clock.captured_s(grab.decoded_s, grab.decoded_s - grab.started_s, grab.stream_s)
        if captured_s is not None and grab.decoded_s - captured_s <= self._max_age_s:
            self.captured_s, self.stale_for_s, self._stale_since_s = captured_s, 0.0, None
            return True
        if self._stale_since_s is None:
            self._stale_since_s = grab.decoded_s
        self.stale_for_s = grab.decoded_s - self._stale_since_s
        return False
