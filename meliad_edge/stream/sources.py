"""From a source of the command line to the reader that fits it."""

from __future__ import annotations

from meliad_edge.stream.camera import CameraReader
from meliad_edge.stream.files import ImageReader, VideoReader
from meliad_edge.stream.reader import Reader
from meliad_edge.stream.uri import SourceKind, SourceUri


def open_source(source: SourceUri) -> Reader:
    """The reader of a source; it connects when it is started.

    Raises:
        DataError: A folder or glob without images.
    """
    if source.kind is SourceKind.VIDEO:
        return VideoReader(source)
    if source.kind is SourceKind.IMAGES:
        return ImageReader(source)
    return CameraReader(source)
