"""Small files in which a system tells of itself."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str:
    """Its text without surrounding space; empty when it is not there or not readable."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
