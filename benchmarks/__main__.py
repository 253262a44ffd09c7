"""``python -m meliad_edge.benchmarks NAME [--json FILE]``: everything that compares rather than measures one model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from meliad_edge.cli.output import require_extra, say
from meliad_edge.errors import MeliadError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]


@app.command()
def limit(json: JsonFile = None, rounds: Annotated[int, typer.Option(min=1, help="Rounds of 20 frames.")] = 12) -> None:
    """Frame to decision over the bare backbone, in one run."""
    require_extra("torch", "train")
    require_extra("onnx", "export")
    from meliad_edge.benchmarks import limit as benchmark

    _finish(benchmark.run(rounds), benchmark.describe, json)


@app.command()
def accuracy(
    json: JsonFile = None,
    data: Annotated[str, typer.Option(help="Data set, as fit takes it.")] = "elpv",
    shots: Annotated[int, typer.Option(min=0, help="Labelled anomalies.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 5,
    detector: Annotated[str, typer.Option(help="Detector.")] = "meliad",
) -> None:
    """Few-shot accuracy over several seeds."""
    require_extra("torch", "train")
    from meliad_edge.benchmarks import accuracy as benchmark

    _finish(benchmark.run(data, shots, seeds, detector), benchmark.describe, json)


def _finish(
    result: dict[str, Any], describe: Callable[[dict[str, Any]], list[tuple[str, str]]], file: Path | None
) -> None:
    for topic, text in describe(result):
        say(topic, text)
    if file is not None:
        result["command"] = " ".join(["python -m meliad_edge.benchmarks", *sys.argv[1:]])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dumps(result, indent=1) + "\n", encoding="utf-8")
        say("saved", str(file))


def main() -> None:
    """Run a benchmark; an error of ours becomes one line and its exit code."""
    try:
        app()
    except MeliadError as error:
        say("error", str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
