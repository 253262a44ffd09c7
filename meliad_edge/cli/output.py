"""How verbs speak: aligned fact lines for people, one JSON object for programs, progress bars for waiting."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from meliad_edge import strict_json
from meliad_edge.errors import MissingExtraError

if TYPE_CHECKING:
    from meliad_edge.calibrate import Calibration


def say(topic: str, text: str) -> None:
    """Print one fact for a person: a topic in the left column, then the sentence. Goes to standard error.

    Standard output belongs to results alone, so ``--json`` can always be piped.
    """
    typer.echo(f"{topic:<11}{text}", err=True)


def print_json(value: Any) -> None:
    """Print one result as JSON on standard output; numbers that are not finite become null."""
    typer.echo(strict_json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> None:
    """Print a table for a person on standard output; the first column is left-aligned, figures right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, caption=caption or None, caption_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a file name is not markup
    Console().print(table)


def describe_calibration(calibration: Calibration) -> str:
    """The threshold in one sentence: its target, what it rests on, and how far it can be trusted."""
    rate = f"{100.0 * calibration.target_false_alarm_rate:g}"
    plural = "" if rate == "1" else "s"
    sentence = (
        f"{calibration.threshold:.3f} at {rate} false alarm{plural} in 100 ({calibration.count} calibration images; "
        f"upper bound {100.0 * calibration.upper_bound:.1f} in 100)"
    )
    if calibration.guaranteed_false_alarm_rate > calibration.target_false_alarm_rate:
        needed = math.ceil(1.0 / calibration.target_false_alarm_rate - 1e-9) - 1
        sentence += (
            f"; so few images can only promise {100.0 * calibration.guaranteed_false_alarm_rate:.1f} in 100, "
            f"the rate you asked for needs {needed:,} of them"
        )
    return sentence


def require_extra(package: str, extra: str) -> None:
    """Refuse early, with the command that helps, when an optional dependency of a verb is missing.

    Raises:
        MissingExtraError: The package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra)
