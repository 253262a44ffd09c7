"""``python -m meliad_edge.benchmarks NAME [--json FILE]``: everything that compares rather than measures one model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meliad_edge.cli.output import require_extra, say
from meliad_edge.errors import MeliadError
from meliad_edge.precision import Precision
from meliad_edge.strict_json import dumps

if TYPE_CHECKING:
    from meliad_edge.benchmarks.accuracy import Plan

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write the table as Markdown.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the result (PNG, SVG or PDF).")]
Sets = Annotated[str, typer.Option(help="elpv, magnetic_tile, cookies, or data sets as fit takes them.")]
Settings = Annotated[str, typer.Option(help="Numbers of labelled anomalies, and hard: all of one class.")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Number of seeds.", show_default=False)]
ImageSize = Annotated[
    int | None, typer.Option(help="Model input in pixels, square.  [default: chosen by fit]", show_default=False)
]
DataFolder = Annotated[Path, typer.Option(help="Where the folders magnetic_tile, aws_cookies and videos are.")]
FeatureCache = Annotated[Path, typer.Option(help="Keep backbone features here.")]
Work = Annotated[Path, typer.Option(help="Keep finished results here; the same command goes on with them.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Jobs at a time.  [default: half of the cores]", show_default=False)
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Compute on a Ray cluster whose nodes reach the folders: auto, HOST:PORT, local.",
    ),
]

_DATA_FOLDER = Path("../shared/data")
_FEATURE_CACHE = Path(".cache/features")
_SET_CACHE = Path(".cache/benchmarks/sets")
_WORK = Path(".cache/benchmarks/accuracy")


@app.command()
def limit(
    json: JsonFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of 20 frames.")] = 12,
    threads: Annotated[int | None, typer.Option(min=1, help="Of ONNX Runtime.  [default: every core]")] = None,
) -> None:
    """Frame to decision over the bare backbone, in one run."""
    require_extra("torch", "train")
    require_extra("onnx", "export")
    from meliad_edge.benchmarks import limit as benchmark

    _finish(benchmark.run(rounds, threads), benchmark.describe, json)


@app.command()
def watch(
    json: JsonFile = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Of four cameras at once.")] = 30.0,
    precision: Annotated[Precision, typer.Option(help="Graph of the sample model.")] = "fp32",
) -> None:
    """One camera, then four that offer too much: cost beyond the engine, fairness, freshness, memory."""
    require_extra("torch", "train")
    require_extra("onnx", "export")
    from meliad_edge.benchmarks import watching as benchmark

    _finish(benchmark.run(minutes, precision), benchmark.describe, json)


@app.command()
def startup(json: JsonFile = None, runs: Annotated[int, typer.Option(min=1, help="Of each process.")] = 9) -> None:
    """Time of --help and of imports, and memory of watch, beyond the libraries' own."""
    require_extra("torch", "train")
    require_extra("onnx", "export")
    from meliad_edge.benchmarks import startup as benchmark

    _finish(benchmark.run(runs), benchmark.describe, json)


@app.command()
def archive(
    json: JsonFile = None,
    images: Annotated[int, typer.Option(min=10, help="In the archive.")] = 10_000,
    precision: Annotated[Precision, typer.Option(help="Of the sample model.")] = "fp32",
    ray: Annotated[bool, typer.Option("--on-ray", help="Score on a Ray cluster of this machine, too.")] = False,
) -> None:
    """What score costs beyond a bare loop, what a second worker brings, and its memory."""
    require_extra("torch", "train")
    require_extra("onnx", "export")
    require_extra("pyarrow", "archive")
    from meliad_edge.benchmarks import archive as benchmark

    _finish(benchmark.run(images, precision, ray), benchmark.describe, json)


@app.command()
def health(
    json: JsonFile = None,
    scenes: Annotated[int, typer.Option(min=1, help="Of each group.")] = 20,
    data_folder: DataFolder = _DATA_FOLDER,
) -> None:
    """What is recognised of the condition of a camera, what is reported without cause, and the cost per frame."""
    require_extra("elpv_dataset", "demo")
    from meliad_edge.benchmarks import health as benchmark

    _finish(benchmark.run(scenes, data_folder), benchmark.describe, json)


@app.command()
def drift(json: JsonFile = None, lines: Annotated[int, typer.Option(min=1, help="Of each kind.")] = 100) -> None:
    """False alarms of the drift of scores, and how soon a shift is found."""
    from meliad_edge.benchmarks import drift as benchmark

    _finish(benchmark.run(lines), benchmark.describe, json)


@app.command()
def kernel(
    json: JsonFile = None,
    plot: PlotFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of 10 runs.")] = 10,
) -> None:
    """The scoring kernel over the function body and a bare matrix product, in one run."""
    require_extra("torch", "train")
    require_extra("onnx", "export")
    if plot is not None:
        require_extra("matplotlib", "plot")
    from meliad_edge.benchmarks import kernel as benchmark

    result = benchmark.run(rounds)
    _finish(result, benchmark.describe, json)
    if plot is not None:
        benchmark.plot(result, plot)
        say("saved", str(plot))


@app.command()
def precision(
    json: JsonFile = None,
    data: Annotated[str, typer.Option(help="Data set, as fit takes it.")] = "elpv",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
    feature_cache: FeatureCache = _FEATURE_CACHE,
) -> None:
    """Decisions, AUROC and time of FP16 and INT8 against FP32, on test images."""
    require_extra("torch", "train")
    require_extra("onnx", "export")
    from meliad_edge.benchmarks import precision as benchmark

    _finish(benchmark.run(data, seeds, feature_cache), benchmark.describe, json)


@app.command()
def peers(
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    plot: PlotFile = None,
    data: Annotated[str, typer.Option(help="Data set, as fit takes it.")] = "elpv",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of up to 20 frames.")] = 15,
    threads: Annotated[list[int], typer.Option(min=1, help="Of the engines; repeat it for several.")] = [1, 2],  # noqa: B006
    feature_cache: FeatureCache = _FEATURE_CACHE,
) -> None:
    """Our exported models and anomalib's: accuracy, and time from frame to map on ONNX Runtime and OpenVINO."""
    for package, extra in (("torch", "train"), ("onnx", "export"), ("anomalib", "peers"), ("openvino", "openvino")):
        require_extra(package, extra)
    if plot is not None:
        require_extra("matplotlib", "plot")
    from meliad_edge.benchmarks import peers as benchmark
    from meliad_edge.benchmarks import peers_page

    result = benchmark.run(data, rounds, threads, feature_cache)
    _finish(result, benchmark.describe, json)
    if markdown is not None:
        _save(peers_page.to_markdown(result), markdown)
    if plot is not None:
        peers_page.plot(result, plot)
        say("saved", str(plot))


@app.command()
def roofline(markdown: MarkdownFile = None) -> None:
    """What the CUDA kernels could reach on devices we do not have; needs nvcc, not a GPU."""
    from meliad_edge.benchmarks import roofline as benchmark

    page = benchmark.to_markdown(benchmark.compiler_report())
    typer.echo(page, nl=False)
    if markdown is not None:
        _save(page, markdown)


@app.command()
def accuracy(
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    sets: Sets = "elpv,magnetic_tile,cookies",
    settings: Settings = "10,1,0,hard",
    detectors: Annotated[str, typer.Option(help="Detectors, separated by commas.")] = "meliad",
    peers: Annotated[bool, typer.Option("--peers", help="Add anomalib's models, which learn without labels.")] = False,
    seeds: Seeds = None,
    image_size: ImageSize = None,
    interpretability: Annotated[bool, typer.Option(help="Measure how well the maps explain, too.")] = False,
    data_folder: DataFolder = _DATA_FOLDER,
    feature_cache: FeatureCache = _FEATURE_CACHE,
    work: Work = _WORK,
    workers: Workers = None,
    ray: RayAddress = None,
) -> None:
    """Few-shot accuracy over several seeds, 5 or 10 for one shot, beside published figures."""
    require_extra("torch", "train")
    if peers:
        require_extra("anomalib", "peers")
    from meliad_edge.benchmarks import accuracy as benchmark
    from meliad_edge.benchmarks.peer_detectors import LEFT_OUT, PEERS

    plan = benchmark.Plan(
        variants=benchmark.parse_variants(detectors),
        peers=PEERS if peers else (),
        sets=benchmark.parse_sets(sets),
        settings=benchmark.parse_settings(settings),
        seeds=seeds,
        image_size=image_size,
        interpretability=interpretability,
        data_folder=data_folder,
        set_cache=_SET_CACHE,
        feature_cache=feature_cache,
        work=work,
        workers=workers,
        ray=ray,
    )
    _run_plan(plan, "accuracy", list(LEFT_OUT) if peers else [], json, markdown)


@app.command()
def ablation(
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    sets: Sets = "elpv",
    settings: Settings = "10",
    seeds: Seeds = None,
    image_size: ImageSize = None,
    data_folder: DataFolder = _DATA_FOLDER,
    feature_cache: FeatureCache = _FEATURE_CACHE,
    work: Work = _WORK,
    workers: Workers = None,
    ray: RayAddress = None,
) -> None:
    """What each part of a method contributes to its accuracy, over 3 seeds."""
    require_extra("torch", "train")
    from meliad_edge.benchmarks import accuracy as benchmark
    from meliad_edge.benchmarks.ablation import ABLATIONS, SEEDS

    plan = benchmark.Plan(
        variants=ABLATIONS,
        sets=benchmark.parse_sets(sets),
        settings=benchmark.parse_settings(settings),
        seeds=seeds or SEEDS,
        image_size=image_size,
        data_folder=data_folder,
        set_cache=_SET_CACHE,
        feature_cache=feature_cache,
        work=work,
        workers=workers,
        ray=ray,
    )
    _run_plan(plan, "ablation", [], json, markdown)


def _run_plan(plan: Plan, name: str, left_out: list[str], json: Path | None, markdown: Path | None) -> None:
    from meliad_edge.benchmarks import accuracy as benchmark
    from meliad_edge.benchmarks.accuracy_table import to_markdown

    result = benchmark.run(plan, name)
    result["left_out"] += left_out
    result["command"] = _command()
    table = to_markdown(result)
    typer.echo(table, nl=False)
    if markdown is not None:
        _save(table, markdown)
    if json is not None:
        _save(dumps(result, indent=1) + "\n", json)


def _finish(
    result: dict[str, Any], describe: Callable[[dict[str, Any]], list[tuple[str, str]]], file: Path | None
) -> None:
    for topic, text in describe(result):
        say(topic, text)
    if file is not None:
        result["command"] = _command()
        _save(dumps(result, indent=1) + "\n", file)


def _command() -> str:
    return " ".join(["python -m meliad_edge.benchmarks", *sys.argv[1:]])


def _save(text: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
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
