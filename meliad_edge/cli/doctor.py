"""``meliad-edge doctor``: what this machine has, what it lacks, and the command that mends it."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

from meliad_edge.cli.options import Json
from meliad_edge.cli.output import print_json
from meliad_edge.errors import MeliadError

if TYPE_CHECKING:
    from meliad_edge.device.probe import Fact

_STYLES = {"ok": "green", "warn": "yellow", "missing": "red", "info": "dim"}


def command(json: Json = False) -> None:
    """Check this machine: versions, processor, GPU, cameras, and how to mend what is missing."""
    from meliad_edge.device.probe import probe

    facts = probe()
    lacking = [fact for fact in facts if fact.required and fact.status == "missing"]
    if json:
        print_json({"ok": not lacking, "facts": [asdict(fact) for fact in facts]})
    else:
        _print_facts(facts)
    if lacking:
        names = ", ".join(fact.name for fact in lacking)
        msg = f"{len(lacking)} required part(s) missing: {names}; run: {lacking[0].fix}"
        raise MeliadError(msg)


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
