"""From a source of the command line to the reader that fits it."""

from __future__ import annotations

from meliad_edge.errors import UsageError
from meliad_edge.stream.camera import CameraReader
from meliad_edge.stream.files import FollowedImageReader, ImageReader, VideoReader
from meliad_edge.stream.reader import Reader
from meliad_edge.stream.uri import SourceKind, SourceUri


def open_source(source: SourceUri, *, max_fps: float | None = None, follow: bool = False) -> Reader:
    """The reader of a source; it connects when it is started.

    Args:
        source: What is read.
        max_fps: Most frames per second of a live source.
        follow: Of a folder or glob: go on with the pictures that arrive.

    Raises:
        DataError: A folder or glob without images, or to be followed and not there.
        UsageError: Something else than a folder is to be followed, or a frame rate is given for files.
    """
    if follow and source.kind is not SourceKind.IMAGES:
        msg = f"{source.shown}: only a folder or glob of images can be followed"
        raise UsageError(msg)
    if max_fps is not None and not source.is_live:
        msg = f"{source.shown}: files are read without loss; max_fps is for cameras"
        raise UsageError(msg)
    if source.kind is SourceKind.VIDEO:
        return VideoReader(source)
    if source.kind is SourceKind.IMAGES:
        return FollowedImageReader(source) if follow else ImageReader(source)
    return CameraReader(source, max_fps=max_fps)
