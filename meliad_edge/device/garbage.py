"""Removes from a device what no slot needs."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from meliad_edge.device.slots import Home

# Another flash may have put it there and not used it yet.
_YOUNG_S = 3600.0


def clean(home: Home) -> None:
    """Remove the parts that arrived, and the runtimes and wheels of models that are gone."""
    for path in home.folder.glob("incoming/[!.]*"):
        path.unlink(missing_ok=True)
    used = {link.readlink().parent.name for link in home.folder.glob("slots/*/python") if link.is_symlink()}
    runtimes = list(home.folder.glob("runtimes/*"))
    _remove_old([path for path in runtimes if path.name not in used])
    needed = {sha256 for path in runtimes if path.is_dir() for sha256 in json.loads((path / "wheels.json").read_text())}
    _remove_old([path for path in home.folder.glob("wheels/*") if path.name not in needed])
    _remove_old(list(home.folder.glob("incoming/.*")))


def _remove_old(paths: list[Path]) -> None:
    for path in paths:
        if time.time() - path.stat().st_mtime > _YOUNG_S:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
