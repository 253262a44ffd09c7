"""Where the keys of this machine are."""

from __future__ import annotations

import os
from pathlib import Path


def keys_folder() -> Path:
    """Where keys are: ``MELIAD_EDGE_KEYS``, else ``~/.config/meliad-edge/keys``."""
    return Path(os.environ.get("MELIAD_EDGE_KEYS") or Path.home() / ".config" / "meliad-edge" / "keys")
