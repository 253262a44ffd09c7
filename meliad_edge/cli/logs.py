"""``meliad-edge logs``: what a device's watch has written."""

from __future__ import annotations

from typing import Annotated

import typer

from meliad_edge.cli.options import Host, Json, KnownHosts
from meliad_edge.cli.output import print_json, require_extra


def command(
    host: Host,
    lines: Annotated[int, typer.Option(min=1, help="How many of the last lines.")] = 50,
    known_hosts: KnownHosts = None,
    json: Json = False,
) -> None:
    """Show the last lines of a device's watch: its events and errors."""
    require_extra("asyncssh", "deploy")
    from meliad_edge.device.remote import ask_one, read_logs
    from meliad_edge.device.ssh import Address

    shown = ask_one(Address.parse(host), known_hosts, read_logs)[-lines:]
    if json:
        print_json({"host": host, "lines": shown})
    else:
        for line in shown:
            typer.echo(line)
