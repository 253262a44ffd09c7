"""Flashing a fleet in waves: one device first, then the others; the first bad wave is the last."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meliad_edge.device.flash import FlashResult, FlashSettings, Parcel, flash
from meliad_edge.device.ssh import Address
from meliad_edge.device.watch_folder import compose_watch
from meliad_edge.errors import MeliadError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_AT_ONCE = 8

Verdict = Literal["installed", "unchanged", "failed", "not tried"]


class Device(BaseModel):
    """One device of an inventory.

    Attributes:
        host: ``[USER@]HOST[:PORT]``.
        wave: Devices of one number are flashed together, lower numbers first.
        canary: Whether it goes before every wave; where none is named, the first device of the first wave does.
        sources: What it watches; where neither that nor a config is named, that of the command line.
        config: File of its watch, from the folder of the inventory.
        python: Its Python, where it is not the one of the command line.
        installed: Whether that Python has meliad-edge already.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(min_length=1)
    wave: int = Field(default=1, ge=1)
    canary: bool = False
    sources: tuple[str, ...] | None = None
    config: Path | None = None
    python: str | None = None
    installed: bool | None = None

    @property
    def address(self) -> Address:
        """Where it is."""
        return Address.parse(self.host)

    def settings(self, common: FlashSettings) -> FlashSettings:
        """How it is flashed: as all, but for what the inventory says of it.

        Raises:
            UsageError: What it shall watch cannot be used.
        """
        return replace(
            common,
            watch=compose_watch(self.sources, self.config, common.window) or common.watch,
            python=common.python if self.python is None else self.python,
            installed=common.installed if self.installed is None else self.installed,
        )


class _Inventory(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: tuple[Device, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class FleetEntry:
    """What came of one device.

    Attributes:
        host: The device.
        wave: 0 for a canary.
        verdict: ``"not tried"`` where an earlier wave failed.
        error: Why it failed.
        result: What flashing came to, where it did not fail.
    """

    host: str
    wave: int
    verdict: Verdict = "not tried"
    error: str = ""
    result: FlashResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "host": self.host,
            "wave": self.wave,
            "verdict": self.verdict,
            "error": self.error or None,
            "seconds": None if self.result is None else self.result.seconds,
            "sent_bytes": None if self.result is None else self.result.sent_bytes,
        }


def read_inventory(file: Path) -> tuple[Device, ...]:
    """Read the devices of an inventory.

    Raises:
        UsageError: The file is not TOML, a key is not known, or a device is named twice.
    """
    try:
        devices = _Inventory.model_validate(tomllib.loads(file.read_text(encoding="utf-8"))).device
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        msg = f"inventory {file} cannot be read ({error}); it must be a TOML file with a [[device]] for each"
        raise UsageError(msg) from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        msg = f"inventory {file}: {where}: {problem['msg'].lower()}; the keys are {', '.join(Device.model_fields)}"
        raise UsageError(msg) from error
    hosts = [device.host for device in devices]
    twice = next((host for host in hosts if hosts.count(host) > 1), None)
    if twice is not None:
        msg = f"inventory {file}: {twice} is named twice; remove one of them"
        raise UsageError(msg)
    return tuple(
        device.model_copy(update={"config": device.config and file.parent / device.config}) for device in devices
    )


def to_waves(devices: tuple[Device, ...]) -> dict[int, list[Device]]:
    """Devices by wave, in their order; wave 0 holds the canaries."""
    canaries = [device for device in devices if device.canary] or [min(devices, key=lambda device: device.wave)]
    waves = {0: canaries}
    for number in sorted({device.wave for device in devices}):
        rest = [device for device in devices if device.wave == number and device not in canaries]
        if rest:
            waves[number] = rest
    return waves


async def flash_fleet(
    devices: tuple[Device, ...],
    parcel: Parcel,
    common: FlashSettings,
    on_entry: Callable[[FleetEntry], None],
) -> list[FleetEntry]:
    """Flash devices wave by wave, those of a wave together; after a wave in which one failed no other begins.

    A device that runs the bundle already is left alone, so that the same call goes on where one was stopped.

    Args:
        devices: The fleet.
        parcel: The bundle.
        common: How each is flashed, unless the inventory says otherwise.
        on_entry: Told of each device as it ends.

    Raises:
        UsageError: What one of them shall watch cannot be used; none was touched.
    """
    turns = asyncio.Semaphore(_AT_ONCE)
    settings = {device.host: device.settings(common) for device in devices}

    async def flash_one(device: Device, wave: int) -> FleetEntry:
        try:
            async with turns:
                result = await flash(device.address, parcel, settings[device.host], lambda step, text: None)
            entry = FleetEntry(device.host, wave, result.outcome, result=result)
        except MeliadError as error:
            entry = FleetEntry(device.host, wave, "failed", str(error))
        on_entry(entry)
        return entry

    entries: list[FleetEntry] = []
    for wave, members in to_waves(devices).items():
        if any(entry.verdict == "failed" for entry in entries):
            entries += [FleetEntry(device.host, wave) for device in members]
        else:
            entries += await asyncio.gather(*(flash_one(device, wave) for device in members))
    return entries
