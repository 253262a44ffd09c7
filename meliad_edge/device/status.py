"""What runs on a device, for whoever asks."""

from __future__ import annotations

from typing import Any

from meliad_edge import __version__
from meliad_edge.device.service import read_service
from meliad_edge.device.slots import Home, SlotName
from meliad_edge.device.watch_folder import read_watch
from meliad_edge.stream.uri import redact
from meliad_edge.watch_config import WatchConfig


def describe(home: Home) -> dict[str, Any]:
    """The slots, the probation and the watch service as JSON values, without credentials."""
    trial, service = home.read_trial(), read_service(home)
    names: tuple[SlotName, ...] = ("a", "b")
    return {
        "version": __version__,
        "home": str(home.folder),
        "current": home.current(),
        "slots": {
            name: slot.model_dump() | _describe_watch(read_watch(home, name))
            for name in names
            if (slot := home.read_slot(name)) is not None
        },
        "trial": None if trial is None else trial.model_dump(),
        "service": None if service is None else service.model_dump(),
        "flashing": home.is_locked(),
    }


def _describe_watch(watch: WatchConfig | None) -> dict[str, Any]:
    if watch is None:
        return {"sources": [], "page": None}
    return {"sources": [redact(camera.source) for camera in watch.camera], "page": watch.serve}
