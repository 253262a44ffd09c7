"""OpenCV's video reader behind a small interface: one RGB frame at a time, with times, or the reason there is none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.errors import SourceError
from meliad_edge.stream.failures import Failure, FailureKind, diagnose
from meliad_edge.stream.gstreamer import decodes_in_hardware, rtsp_pipeline
from meliad_edge.stream.uri import SourceKind, SourceUri

OPEN_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 5.0
# No camera has a longer or narrower picture; JPEG has no room for such a one, and to bring it to some width would fill
# the memory.
_LONGEST_SIDE = 16_384
_LARGEST_ASPECT = 32

# FFmpeg would write its own lines beside ours. Read by OpenCV when it opens its first video.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

# Named, never CAP_ANY: OpenCV would go on to other backends, whose warnings quote the address with its password.
_BACKENDS = {
    SourceKind.VIDEO: cv2.CAP_FFMPEG,
    SourceKind.RTSP: cv2.CAP_FFMPEG,
    SourceKind.HTTP: cv2.CAP_FFMPEG,
    SourceKind.V4L2: cv2.CAP_V4L2,
    SourceKind.CSI: cv2.CAP_GSTREAMER,
}


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """One decoded frame.

    Attributes:
        image: uint8 RGB [H, W, 3], never written to again.
        started_s, decoded_s, finished_s: Monotonic clock: reading began, the decoder had the frame, RGB was ready.
    """

    image: NDArray[np.uint8]
    started_s: float
    decoded_s: float
    finished_s: float


@dataclass(frozen=True, slots=True)
class Grab:
    """A frame in the decoder, whose colours are not converted yet.

    Attributes:
        started_s, decoded_s: Monotonic clock: reading began, the decoder had the frame.
        stream_s: Its timestamp on the time line of a camera that gives any; None otherwise.
    """

    started_s: float
    decoded_s: float
    stream_s: float | None


class VideoCapture(Protocol):
    """An open video."""

    @property
    def announced_frames(self) -> int | None:
        """Number of frames the container announces, if it does."""
        ...

    @property
    def description(self) -> str:
        """Size and codec, for people."""
        ...

    def read(self, is_wanted: Callable[[Grab], bool] = ...) -> Capture | Failure | None:
        """The next frame, why there is none, or None for one that is not wanted.

        Args:
            is_wanted: Asked before the colours of the frame are converted.
        """
        ...

    def close(self) -> None:
        """Release the decoder and its connection."""
        ...


def open_capture(source: SourceUri, *, clock: Callable[[], float] = time.monotonic) -> VideoCapture | Failure:
    """Open a video, stream or device, or say why that is not possible.

    Raises:
        SourceError: This OpenCV was built without the backend that the source needs.
    """
    backend, address = _BACKENDS[source.kind], source.address
    if source.kind is SourceKind.RTSP and _has(cv2.CAP_GSTREAMER) and decodes_in_hardware():
        backend, address = cv2.CAP_GSTREAMER, rtsp_pipeline(source.address)
    if not _has(backend):
        name = cv2.videoio_registry.getBackendName(backend)
        msg = (
            f"{source.shown}: needs OpenCV with {name}, which OpenCV {cv2.__version__} here was built without; "
            f"use the system's OpenCV"
        )
        raise SourceError(msg)
    properties: list[int] = []
    if backend == cv2.CAP_FFMPEG:
        properties += [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, round(1000 * OPEN_TIMEOUT_S)]
        properties += [cv2.CAP_PROP_READ_TIMEOUT_MSEC, round(1000 * READ_TIMEOUT_S)]
    if source.form is not None:
        properties += [cv2.CAP_PROP_FRAME_WIDTH, source.form.width, cv2.CAP_PROP_FRAME_HEIGHT, source.form.height]
        properties += [cv2.CAP_PROP_FPS, source.form.fps]
    video = cv2.VideoCapture(address, backend, properties)
    return _OpenCvCapture(video, source.kind, clock) if video.isOpened() else diagnose(source)


def _has(backend: int) -> bool:
    return bool(cv2.videoio_registry.hasBackend(backend))


class _OpenCvCapture:
    def __init__(self, video: cv2.VideoCapture, kind: SourceKind, clock: Callable[[], float]) -> None:
        self._video = video
        self._kind = kind
        self._clock = clock
        # Decoded into again and again. When a stream changes its resolution, OpenCV scales to the first one until the
        # stream is opened again: the whole picture still arrives.
        self._bgr: NDArray[np.uint8] | None = None

    @property
    def announced_frames(self) -> int | None:
        count = int(self._video.get(cv2.CAP_PROP_FRAME_COUNT))
        return count if count > 0 else None

    @property
    def description(self) -> str:
        width, height = (int(self._video.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        code = int(self._video.get(cv2.CAP_PROP_FOURCC))
        codec = "".join(c for c in code.to_bytes(4, "little", signed=code < 0).decode("latin-1") if c.isalnum())
        return f"{width}x{height}" + (f", {codec}" if codec else "")

    def read(self, is_wanted: Callable[[Grab], bool] = lambda grab: True) -> Capture | Failure | None:
        started_s = self._clock()
        if not self._video.grab():
            # FFmpeg gives the same answer for both; only the time that passed tells them apart.
            if self._clock() - started_s >= 0.9 * READ_TIMEOUT_S:
                return Failure(FailureKind.TIMEOUT, f"no frame for {READ_TIMEOUT_S:g} s")
            return Failure(FailureKind.ENDED, "the stream ended")
        decoded_s = self._clock()
        # Over HTTP, FFmpeg numbers the pictures and calls that their time.
        stream_s = 1e-3 * self._video.get(cv2.CAP_PROP_POS_MSEC) if self._kind is SourceKind.RTSP else None
        if not is_wanted(Grab(started_s, decoded_s, stream_s)):
            return None
        is_read, bgr = self._video.retrieve(self._bgr) if self._bgr is not None else self._video.retrieve()
        if not is_read:
            return Failure(FailureKind.CODEC, "a frame could not be decoded")
        short, long = sorted(bgr.shape[:2])
        if long > _LONGEST_SIDE or long > _LARGEST_ASPECT * short:
            return Failure(FailureKind.CODEC, f"a picture of {bgr.shape[1]}x{bgr.shape[0]} is not from a camera")
        self._bgr = np.asarray(bgr, dtype=np.uint8)
        image = np.asarray(cv2.cvtColor(self._bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)
        return Capture(image, started_s, decoded_s, self._clock())

    def close(self) -> None:
        self._video.release()
