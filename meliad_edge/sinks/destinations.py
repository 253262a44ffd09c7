"""What an ``--out`` stands for."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from meliad_edge.errors import UsageError
from meliad_edge.stream.uri import redact


def parse_folder(destination: str) -> Path:
    """The folder that a path or ``file://`` names.

    Raises:
        UsageError: Another scheme.
    """
    scheme, separator, rest = destination.partition("://")
    if not separator:
        return Path(destination)
    if scheme.lower() == "file" and rest:
        return Path(re.sub(r"^localhost(?=/)", "", unquote(rest)))
    msg = f"--out {redact(destination)}: not supported in this version; give a folder, as a path or file:///PATH"
    raise UsageError(msg)
