"""Finite sources, read in order and without loss: a video file, and pictures of a folder or glob."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import count

from meliad_edge.data.images import find_images, read_image
from meliad_edge.errors import ImageError, SourceError
from meliad_edge.stream.capture import Capture, open_capture
from meliad_edge.stream.failures import Failure, FailureKind
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.reader import Reader, ReaderState
from meliad_edge.stream.uri import SourceUri

# Containers count their frames in different ways; a video this much shorter than announced is truncated.
_TRUNCATED_BELOW = 0.95


class VideoReader(Reader):
    """Every frame of a video file, decoded ahead of the frame loop by a few frames."""

    def _read_frames(self) -> None:
        video = open_capture(self.source, clock=self._clock)
        if isinstance(video, Failure):
            raise video.to_error(self.source)
        try:
            self.total = video.announced_frames
            self.state = ReaderState.STREAMING
            self.description = video.description
            self._notify(f"{video.description}, {self.total or 'unknown number of'} frames")
            for frame_id in count():
                captured = video.read()
                if isinstance(captured, Capture):
                    decode_s = captured.finished_s - captured.started_s
                    frame = Frame(self.source.name, frame_id, captured.started_s, captured.image, decode_s)
                    if not self._put(frame):
                        return
                elif captured is not None and captured.kind is FailureKind.CODEC:
                    self.bad += 1
                else:
                    break
        finally:
            video.close()
        self._check_length()

    def _check_length(self) -> None:
        if self.read == 0:
            msg = f"{self.source.shown}: opened, but not one frame could be decoded; record or copy it again"
            raise SourceError(msg)
        delivered = self.read + self.bad
        if self.total is not None and delivered < _TRUNCATED_BELOW * self.total:
            self.is_truncated = True
            self._notify(f"truncated or damaged: ended after {delivered} of {self.total} frames; copy it again")


class ImageReader(Reader):
    """Pictures in the order of their names, each a part of its own; one that cannot be read is reported and counted.

    Raises:
        DataError: No picture is there.
    """

    def __init__(self, source: SourceUri, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(source, clock=clock)
        self._paths = find_images(source.address)
        self._folder = os.path.commonpath([path.parent for path in self._paths])
        self.total = len(self._paths)

    @property
    def is_sequence(self) -> bool:
        """False: every picture is its own part."""
        return False

    def _read_frames(self) -> None:
        self.state = ReaderState.STREAMING
        for frame_id, path in enumerate(self._paths):
            started_s = self._clock()
            try:
                image = read_image(path)
            except ImageError as error:
                self.bad += 1
                self._notify(str(error))
                continue
            name = os.path.relpath(path, self._folder)
            if not self._put(Frame(name, frame_id, started_s, image, self._clock() - started_s)):
                return
        if self.read == 0:
            msg = f"{self.source.shown}: none of {self.bad} images could be read; see the lines above"
            raise SourceError(msg)
