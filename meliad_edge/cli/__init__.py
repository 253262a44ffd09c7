"""The command line: one thin module per verb, and one place where errors become one line and an exit code."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from meliad_edge import __version__
from meliad_edge.cli import (
    bench,
    build,
    calibrate,
    check,
    demo,
    doctor,
    evaluate,
    export,
    feedback,
    fit,
    flash,
    keys,
    logs,
    predict,
    rollback,
    score,
    status,
    threshold,
    watch,
)
from meliad_edge.errors import MeliadError

app = typer.Typer(
    name="meliad-edge",
    help="From ten labelled defects to a watched camera: interpretable few-shot anomaly detection.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# In the order of the line they serve.
for _verb in (
    *(demo, fit, evaluate, calibrate, export, build, check, threshold, predict, score, watch, feedback),
    *(flash, rollback, status, logs, doctor),
):
    app.command(_verb.__name__.rpartition(".")[2])(_verb.command)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"meliad-edge {__version__}")
        raise typer.Exit


app.add_typer(bench.app, name="bench")
app.add_typer(keys.app, name="keys")


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; works after a verb too.")
    ] = False,
) -> None:
    """Options of every verb."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error of ours becomes one line on standard error and its exit code.

    SIGTERM ends it as Ctrl-C does: what was begun is cleaned up.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in args
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app([arg for arg in args if arg != "--debug"])
    except MeliadError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"meliad-edge: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # a place that cannot be written, a disk that is full; what is read has errors of its own
        if debug:
            traceback.print_exc()
        place = f"{error.filename}: " if error.filename else ""
        typer.echo(f"meliad-edge: {place}{error.strerror or error}; free or name another place", err=True)
        sys.exit(MeliadError.exit_code)
    except KeyboardInterrupt:
        typer.echo("meliad-edge: interrupted", err=True)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, previous)
