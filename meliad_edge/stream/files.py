"""Files, read in order and without loss: a video, and pictures of a folder or glob, those to come included."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from meliad_edge.data.images import find_images, glob_folder, list_images, read_image
from meliad_edge.errors import DataError, ImageError, SourceError
from meliad_edge.stream.capture import Capture, open_capture
from meliad_edge.stream.failures import Failure, FailureKind
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.reader import Reader, ReaderState
from meliad_edge.stream.uri import SourceUri

# Looking at a large folder takes time; it may cost a tenth of a core.
_REST_PER_LOOK = 9.0
# Containers count their frames in different ways; a video this much shorter than announced is truncated.
_TRUNCATED_BELOW = 0.95

_SizeAndTime = tuple[int, int]


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


class FollowedImageReader(Reader):
    """Pictures of a folder or glob that is being filled, in the order of their names; it never ends by itself.

    What is there at the start comes first. A picture is read once its size and time have stayed the same from one
    look to the next, so one that is still being written is not taken for damaged. One that is written again under its
    name is a new one. A folder that cannot be listed is waited for: it may be on a share of the network.

    Args:
        source: The folder or glob; it may still be empty.
        clock: Monotonic seconds.
        interval_s: From one look to the next.
        wait: Waits for a delay in seconds; returns whether the reader is to stop. None waits in real time.

    Raises:
        DataError: The folder does not exist.
    """

    def __init__(
        self,
        source: SourceUri,
        *,
        clock: Callable[[], float] = time.monotonic,
        interval_s: float = 0.25,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        super().__init__(source, clock=clock)
        self._folder = glob_folder(source.address)
        if not self._folder.is_dir():
            msg = f"{source.shown}: no such folder; create it, pictures may come later"
            raise DataError(msg)
        self._interval_s = interval_s
        self._wait = wait or self._stopping.wait
        self._next_id = 0

    @property
    def is_sequence(self) -> bool:
        """False: every picture is its own part."""
        return False

    def _read_frames(self) -> None:
        self.state = ReaderState.STREAMING
        self._notify("waiting for pictures")
        settled: dict[Path, _SizeAndTime] = {}  # Those that were read, as long as they are there.
        growing: dict[Path, _SizeAndTime] = {}
        while not self._stopping.is_set():
            started_s = self._clock()
            seen = self._look()
            looked_s = self._clock() - started_s
            if seen:  # What is all gone may be on a share that is away; it is not read again when that is back.
                settled = {path: state for path, state in settled.items() if path in seen}
            new = {path: state for path, state in seen.items() if settled.get(path) != state}
            for path, state in new.items():
                if growing.get(path) == state:
                    settled[path] = state
                    if not self._read_picture(path):
                        return
            growing = new
            if self._wait(max(self._interval_s, _REST_PER_LOOK * looked_s)):
                return

    def _look(self) -> dict[Path, _SizeAndTime]:
        """What is there; nothing, and the reader waits, while that cannot be found out."""
        try:
            states = {path: _size_and_time(path) for path in list_images(self.source.address)}
        except (OSError, DataError) as error:
            if isinstance(error.__cause__, ValueError):  # The pattern is wrong, and stays so.
                raise
            if self.state is not ReaderState.WAITING:
                self.state = ReaderState.WAITING
                self._notify(f"{error}; waiting until it can be listed again")
            return {}
        self.state = ReaderState.STREAMING
        self.alive_s = self._clock()
        return {path: state for path, state in states.items() if state is not None}

    def _read_picture(self, path: Path) -> bool:
        """Hand over one picture; False when the reader was closed."""
        started_s = self._clock()
        frame_id, self._next_id = self._next_id, self._next_id + 1
        try:
            image = read_image(path)
        except ImageError as error:
            self.bad += 1
            self._notify(str(error))
            return True
        name = os.path.relpath(path, self._folder)
        return self._put(Frame(name, frame_id, started_s, image, self._clock() - started_s))


def _size_and_time(path: Path) -> _SizeAndTime | None:
    """What changes while a file is written; None when it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


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
