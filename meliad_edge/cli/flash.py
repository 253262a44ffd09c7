"""``meliad-edge flash``: a bundle onto a device, signed, gated, and with a way back."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meliad_edge.cli.options import HostOrFleet, Json, KnownHosts
from meliad_edge.cli.output import print_json, print_table, require_extra, say
from meliad_edge.errors import PartialFailureError, UsageError

if TYPE_CHECKING:
    from meliad_edge.device.flash import FlashSettings, Parcel
    from meliad_edge.device.fleet import FleetEntry

# Steps that may take long: they are announced, not only reported.
_LONG_STEPS = ("runtime", "parts", "engine", "probation")


def command(
    host: HostOrFleet,
    model: Annotated[Path, typer.Argument(metavar="MODEL.meliad", help="Signed bundle.", show_default=False)],
    source: Annotated[
        list[str] | None,
        typer.Option(help="What the device shall watch; may be repeated.  [default: what it watches]"),
    ] = None,
    window: Annotated[str, typer.Option(metavar="N/M", help="N anomalous frames of M make an event.")] = "3/5",
    probation: Annotated[
        float, typer.Option(min=1.0, metavar="SECONDS", help="How long the model must run before it is confirmed.")
    ] = 30.0,
    trust: Annotated[
        Path | None, typer.Option(metavar="FILE.pub", help="Public key the device shall trust from now on.")
    ] = None,
    allow_downgrade: Annotated[
        bool, typer.Option("--allow-downgrade", help="Accept a lower version than the device has.")
    ] = False,
    wheels: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Wheels for the device, ours among them; see README.")
    ] = None,
    python: Annotated[str, typer.Option(help="Python of the device.")] = "python3",
    installed: Annotated[
        bool, typer.Option("--installed", help="That Python has meliad-edge already: install nothing.")
    ] = False,
    known_hosts: KnownHosts = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Page about the flash of a fleet.")] = None,
    json: Json = False,
) -> None:
    """Put a signed bundle into use on a device; it goes back by itself if the bundle fails there."""
    require_extra("asyncssh", "deploy")
    from meliad_edge.device.flash import FlashSettings, Parcel

    settings = FlashSettings(
        sources=None if source is None else tuple(source),
        window=window,
        probation_s=probation,
        allow_downgrade=allow_downgrade,
        trust=trust,
        python=python,
        installed=installed,
        wheels=wheels,
        known_hosts=known_hosts,
    )
    parcel = Parcel.read(model)
    if host.endswith(".toml"):
        _flash_fleet(Path(host), parcel, settings, report, json)
    elif report is not None:
        msg = "--report is about fleets; name an inventory, FLEET.toml, in place of the host"
        raise UsageError(msg)
    else:
        _flash_one(host, parcel, settings, json)


def _flash_one(host: str, parcel: Parcel, settings: FlashSettings, json: bool) -> None:
    from meliad_edge.device.flash import flash
    from meliad_edge.device.ssh import Address

    result = asyncio.run(flash(Address.parse(host), parcel, settings, _say_step))
    say(
        "flashed" if result.outcome == "installed" else "unchanged",
        f"{host} in {result.seconds:.1f} s, {result.sent_bytes:,} bytes sent      next: meliad-edge status {host}",
    )
    if json:
        print_json({"host": host, "name": parcel.manifest.name, "version": parcel.manifest.version, **asdict(result)})


def _say_step(step: str, text: str) -> None:
    if text or step.endswith(_LONG_STEPS):
        say(f"{step}  ", text or "...")


def _flash_fleet(file: Path, parcel: Parcel, settings: FlashSettings, report: Path | None, json: bool) -> None:
    from meliad_edge.device.fleet import flash_fleet, read_inventory, to_waves
    from meliad_edge.device.fleet_report import render_report

    devices = read_inventory(file)
    canary, *waves = to_waves(devices).values()
    names = ", ".join(device.host for device in canary)
    say("fleet", f"{len(devices)} devices: first {names}, then {', '.join(str(len(wave)) for wave in waves) or 'none'}")
    entries = asyncio.run(flash_fleet(devices, parcel, settings, _say_entry))
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(render_report(parcel.manifest, entries), encoding="utf-8")
        say("saved", str(report))
    if json:
        print_json(
            {
                "name": parcel.manifest.name,
                "version": parcel.manifest.version,
                "devices": [entry.to_dict() for entry in entries],
            }
        )
    else:
        print_table(("device", "wave", "outcome", "seconds", "bytes sent"), [_row(entry) for entry in entries])
    if failed := [entry for entry in entries if entry.verdict == "failed"]:
        left = sum(entry.verdict == "not tried" for entry in entries)
        msg = (
            f"{len(failed)} of {len(entries)} devices failed, {left} were not tried after them; the first: "
            f"{failed[0].error}; then flash {file} again, devices that are done are left alone"
        )
        raise PartialFailureError(msg)


def _say_entry(entry: FleetEntry) -> None:
    say(f"{entry.verdict}  ", entry.error or entry.host)


def _row(entry: FleetEntry) -> tuple[str, ...]:
    result = entry.result
    seconds, sent = ("", "") if result is None else (f"{result.seconds:.1f}", f"{result.sent_bytes:,}")
    return entry.host, "canary" if entry.wave == 0 else str(entry.wave), entry.verdict, seconds, sent
