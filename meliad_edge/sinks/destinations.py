"""From the URI given to ``--out`` to the sink that fits it."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from meliad_edge.errors import UsageError
from meliad_edge.event_store import EventStore
from meliad_edge.sinks.folder import FolderSink
from meliad_edge.sinks.sink import Sink
from meliad_edge.stream.uri import redact


def open_sink(destination: str, value_range: tuple[float, float]) -> Sink:
    """Open where events go.

    Args:
        destination: A folder, as a path or ``file://``.
        value_range: Colour scale of pictures, ``Calibration.colour_range``.

    Raises:
        UsageError: A scheme that is not supported, or a folder that cannot be written.
    """
    scheme, separator, rest = destination.partition("://")
    if not separator:
        return FolderSink(EventStore(Path(destination)), value_range)
    if scheme.lower() == "file" and rest:
        return FolderSink(EventStore(Path(re.sub(r"^localhost(?=/)", "", unquote(rest)))), value_range)
    msg = f"--out {redact(destination)}: not supported in this version; give a folder, as a path or file:///PATH"
    raise UsageError(msg)
