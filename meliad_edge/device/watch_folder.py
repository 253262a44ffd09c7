"""What a device shall watch, as it travels and as it lies in a slot: ``watch.json``, and ``watch/`` with its files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meliad_edge.device.slots import WATCH_FILE, Home, SlotName, read_record, write_record
from meliad_edge.errors import DeviceError, UsageError
from meliad_edge.stream.credentials import read_secrets
from meliad_edge.watch_config import WatchConfig, command_line_cameras, read_watch_config

_FOLDER = "watch"
_MAX_FILE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class PackedWatch:
    """The settings of a watch, and the files they name.

    Attributes:
        config: Names its files ``watch/SHA-256``, as they lie in a slot.
        files: Their contents by SHA-256: masks, secrets, certificates; not part of the representation.
    """

    config: WatchConfig
    files: dict[str, bytes] = field(repr=False)


def pack_watch(config: WatchConfig) -> PackedWatch:
    """Check the settings of a watch where they are written, and take its files along.

    Folders of ``out`` are left out: a device keeps its events in a folder of its own.

    Args:
        config: As read from a file; secrets in the variables of this machine do not travel.

    Raises:
        UsageError: A file cannot be read, or an address or a secret cannot be used.
    """
    if config.camera_secrets is not None:
        read_secrets(config.camera_secrets)
    config.page()
    destinations = tuple(text for text in config.out if "://" in text and not text.lower().startswith("file://"))
    config = config.model_copy(update={"out": destinations})
    with_events(config, Path("events")).outputs(environment={})
    for camera in config.camera:
        camera.to_view()
    files: dict[str, bytes] = {}

    def take(file: Path) -> Path:
        try:
            data = file.read_bytes()
        except OSError as error:
            msg = f"{file}: cannot be read ({error.strerror}); the device needs it"
            raise UsageError(msg) from error
        if len(data) > _MAX_FILE_BYTES:
            msg = f"{file}: {len(data) / 1e6:.1f} MB; what a watch needs beside it may have 4 MB, save masks as PNG"
            raise UsageError(msg)
        sha256 = hashlib.sha256(data).hexdigest()
        files[sha256] = data
        return Path(_FOLDER, sha256)

    return PackedWatch(config.map_files(take), files)


def compose_watch(sources: Sequence[str] | None, config: Path | None, window: str) -> PackedWatch | None:
    """What a device shall watch, from a command line or an inventory; None where neither says anything.

    Args:
        sources: Added to those of the file; empty without a file watches nothing.
        config: File of the watch.
        window: When scores of the sources make an event.

    Raises:
        UsageError: See :func:`pack_watch`.
    """
    if sources is None and config is None:
        return None
    settings = WatchConfig() if config is None else read_watch_config(config)
    cameras = (*settings.camera, *command_line_cameras(sources or (), window=window, follow=False))
    return pack_watch(settings.model_copy(update={"camera": cameras}))


def with_events(config: WatchConfig, folder: Path) -> WatchConfig:
    """The same, with events kept in a folder."""
    return config.model_copy(update={"out": (str(folder), *config.out)})


def read_watch(home: Home, name: SlotName | None) -> WatchConfig | None:
    """What a slot watches; None where it watches nothing.

    Raises:
        DeviceError: The record is damaged.
    """
    return None if name is None else read_record(home.slot_folder(name) / WATCH_FILE, WatchConfig)


def stage_watch(home: Home, config: WatchConfig | None, sent: Mapping[str, bytes]) -> WatchConfig | None:
    """Put settings and files beside the model that is being put together.

    Args:
        home: The folder of meliad-edge.
        config: As it was sent; None keeps what the current slot watches.
        sent: Contents of its files by SHA-256.

    Returns:
        What it watches; None where that is nothing.

    Raises:
        DeviceError: A file was not sent, or was damaged on its way.
    """
    current = home.current()
    if config is None:
        config = read_watch(home, current)
        if config is None or current is None:
            return None
        here = {path.name: path.read_bytes() for path in (home.slot_folder(current) / _FOLDER).glob("*")}
    else:
        config = with_events(config, home.folder / "events")
        here = dict(sent)
    if not config.camera:
        return None

    def put(named: Path) -> Path:
        data = here.get(named.name)
        if data is None or hashlib.sha256(data).hexdigest() != named.name:
            msg = f"{named}: a file of the watch is missing or damaged; flash again"
            raise DeviceError(msg)
        target = home.staging / _FOLDER / named.name
        target.parent.mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
        return Path(_FOLDER, named.name)

    write_record(home.staging / WATCH_FILE, config := config.map_files(put))
    return config
