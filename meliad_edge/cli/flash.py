"""``meliad-edge flash``: a bundle onto a device, signed, gated, and with a way back."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meliad_edge.cli.options import Json, KnownHosts
from meliad_edge.cli.output import print_json, require_extra, say

if TYPE_CHECKING:
    from meliad_edge.device.flash import FlashResult


def command(
    host: Annotated[
        str, typer.Argument(metavar="HOST", help="[USER@]HOST[:PORT], as one gives it to ssh.", show_default=False)
    ],
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
    json: Json = False,
) -> None:
    """Put a signed bundle into use on a device; it goes back by itself if the bundle fails there."""
    require_extra("asyncssh", "deploy")
    from meliad_edge.device.flash import FlashSettings, Parcel, flash
    from meliad_edge.device.ssh import Address

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
    result = asyncio.run(flash(Address.parse(host), parcel, settings, _say_step))
    _say_result(host, result)
    if json:
        print_json({"host": host, "name": parcel.manifest.name, "version": parcel.manifest.version, **asdict(result)})


def _say_step(step: str, text: str) -> None:
    say(f"{step}  ", text or "...")


def _say_result(host: str, result: FlashResult) -> None:
    say("flashed" if result.outcome == "installed" else "unchanged", f"{host} in {result.seconds:.1f} s, {result.sent_bytes:,} bytes sent      next: meliad-edge status {host}")
