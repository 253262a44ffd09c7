"""Progress bars for anything that takes longer than two seconds, drawn on standard error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")

_console = Console(stderr=True)


def progress_bar() -> Progress:
    """A bar with counts, elapsed and remaining time; a plain final line where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=_console,
    )


def hide_progress_bars() -> None:
    """Draw no more bars in this process; for workers, whose parent draws one for all of them."""
    _console.quiet = True


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Iterate over a sequence with a bar.

    Args:
        items: What to iterate over.
        description: Left label, at most 40 characters.
    """
    with progress_bar() as bar:
        task = bar.add_task(f"{description:<24}", total=len(items), note="")
        for item in items:
            yield item
            bar.advance(task)
