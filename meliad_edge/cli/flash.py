"""``meliad-edge flash``: a bundle onto a device, signed, gated, and with a way back."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meliad_edge.cli.options import Json, KnownHosts
from meliad_edge.cli.output import print_json, print_table, require_extra, say
from meliad_edge.errors import DeviceError, PartialFailureError, UsageError

if TYPE_CHECKING:
    from meliad_edge.device.flash import FlashSettings, Parcel
    from meliad_edge.device.fleet import FleetEntry

# Steps that may take long: they are announced, not only reported.
_LONG_STEPS = ("runtime", "parts", "engine", "probation")


def command(
    host: Annotated[
        str | None,
        typer.Argument(
            metavar="HOST", help="[USER@]HOST[:PORT] as for ssh, or FLEET.toml, an inventory.", show_default=False
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL.meliad", help="Signed bundle.", show_default=False)
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="What the device shall watch; may be repeated.  [default: what it watches]"),
    ] = None,
    window: Annotated[
        str, typer.Option(metavar="N/M", help="N anomalous frames of M of a --source make an event.")
    ] = "3/5",
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Cameras, page and receivers of the device, as for watch; see docs/watch.md."
        ),
    ] = None,
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
    os: Annotated[
        str | None,
        typer.Option(metavar="BOARD", help="Instead: show NVIDIA's command for the system of orin-nano or agx-orin."),
    ] = None,
    jetson_linux: Annotated[Path, typer.Option(metavar="DIR", help="With --os: the unpacked Linux_for_Tegra.")] = Path(
        "Linux_for_Tegra"
    ),
    run: Annotated[bool, typer.Option("--run", help="With --os: run it; everything on the board is lost.")] = False,
    json: Json = False,
) -> None:
    """Put a signed bundle into use on a device; it goes back by itself if the bundle fails there."""
    if os is not None:
        _flash_os(os, jetson_linux, run, json)
        return
    if host is None or model is None:
        msg = "name the device and the bundle: meliad-edge flash HOST MODEL.meliad"
        raise UsageError(msg)
    require_extra("asyncssh", "deploy")
    from meliad_edge.device.flash import FlashSettings, Parcel
    from meliad_edge.device.watch_folder import compose_watch

    settings = FlashSettings(
        watch=compose_watch(source, config, window),
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


def _flash_os(board: str, jetson_linux: Path, run: bool, json: bool) -> None:
    """The operating system is NVIDIA's to flash: say how, and do it only when asked to."""
    from meliad_edge.device.recovery import compose_command, find_board, require_ready

    command = compose_command(board)
    found = find_board()
    say("system", "flashed by NVIDIA's own tool, over USB, with the board in recovery mode; all on it is lost")
    say("board", f"{found or 'none'} in recovery mode")
    say("command", f"cd {shlex.quote(str(jetson_linux))} && {shlex.join(command)}")
    if json:
        print_json({"board": board, "in_recovery_mode": found, "command": command, "run": run})
    if not run:
        say("not run", "add --run to run it      then: meliad-edge flash HOST MODEL.meliad")
        return
    require_ready(board, jetson_linux)
    code = subprocess.run(command, cwd=jetson_linux).returncode
    if code != 0:
        msg = (
            f"NVIDIA's tool ended with exit code {code}; its messages above say why, the board is not usable until then"
        )
        raise DeviceError(msg)


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
