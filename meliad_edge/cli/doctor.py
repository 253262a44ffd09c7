"""``meliad-edge doctor``: what this machine has, what it lacks, and the command that mends it."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meliad_edge.cli.options import Json, KnownHosts
from meliad_edge.cli.output import print_json, require_extra
from meliad_edge.errors import MeliadError

if TYPE_CHECKING:
    from meliad_edge.device.probe import Fact

_STYLES = {"ok": "green", "warn": "yellow", "missing": "red", "info": "dim"}


def command(
    host: Annotated[
        str | None,
        typer.Argument(metavar="[HOST]", help="[USER@]HOST[:PORT] as for ssh.  [default: this machine]"),
    ] = None,
    known_hosts: KnownHosts = None,
    python: Annotated[str, typer.Option(help="Python of the device, before it is flashed.")] = "python3",
    json: Json = False,
) -> None:
    """Check a machine: versions, processor, GPU, cameras, and how to mend what is missing."""
    from meliad_edge.device.probe import probe

    facts = probe() if host is None else _ask(host, known_hosts, python)
    lacking = [fact for fact in facts if fact.required and fact.status == "missing"]
    if json:
        print_json({"ok": not lacking, "facts": [asdict(fact) for fact in facts]})
    else:
        _print_facts(facts)
    if lacking:
        names = ", ".join(fact.name for fact in lacking)
        msg = f"{len(lacking)} required part(s) missing: {names}; run: {lacking[0].fix}"
        raise MeliadError(msg)


def _ask(host: str, known_hosts: Path | None, python: str) -> tuple[Fact, ...]:
    """The facts of a device."""
    require_extra("asyncssh", "deploy")
    from meliad_edge.device.probe import Fact
    from meliad_edge.device.remote import ask_one, read_facts
    from meliad_edge.device.ssh import Address

    answer = ask_one(Address.parse(host), known_hosts, lambda link: read_facts(link, python))
    return tuple(Fact(**fields) for fields in answer)


def _print_facts(facts: tuple[Fact, ...]) -> None:
    """Facts by topic, one line each, with the mending command below; lines are not broken, so it can be copied."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    width = max(len(fact.name) for fact in facts)
    for topic, group in groupby(facts, key=lambda fact: fact.topic):
        console.print(Text(topic, style="bold"))
        for fact in group:
            mark = "" if fact.status == "info" else fact.status
            console.print(Text.assemble((f"  {mark:<9}", _STYLES[fact.status]), f"{fact.name:<{width}}  {fact.value}"))
            if fact.fix:
                console.print(Text(f"  {'':<9}{'':<{width}}  {fact.fix}", style="cyan"))
