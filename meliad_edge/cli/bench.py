"""``meliad-edge bench``: latency of a bundle on this machine, two reports compared, and how far from the limit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from meliad_edge.cli.options import BundleEngine, BundleFile, BundlePrecision, Json
from meliad_edge.cli.output import print_json, print_table, require_extra, say
from meliad_edge.errors import UsageError

if TYPE_CHECKING:
    from meliad_edge.benchmarks.latency import LatencyReport

_MEASURE = "measure"


class _MeasuresByDefault(TyperGroup):
    """``bench MODEL`` is ``bench measure MODEL``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # typer's context has no public name in all versions
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [_MEASURE, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_MeasuresByDefault,
    help="Measure a bundle's latency: bench MODEL.meliad is short for bench measure MODEL.meliad.",
    no_args_is_help=True,
)


@app.command()
def measure(
    model: BundleFile,
    json: Json = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with charts.", show_default=False)
    ] = None,
    frames: Annotated[int, typer.Option(min=10, help="Frames in the report, after the warm-up.")] = 200,
    frame_size: Annotated[str, typer.Option(metavar="WxH", help="Size of the frames that are decoded.")] = "640x480",
    deadline_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Count the frames that take longer.", show_default=False)
    ] = None,
    batches: Annotated[
        str | None, typer.Option(metavar="1,2,4", help="Measure the engine with batches, too.", show_default=False)
    ] = None,
    engine: BundleEngine = "auto",
    precision: BundlePrecision = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine.  [default: every core]")] = None,
) -> None:
    """Measure capture, decode, preprocess, infer, score and post, window after window until the medians agree."""
    from meliad_edge.benchmarks.environment import describe_environment
    from meliad_edge.benchmarks.latency import measure_latency
    from meliad_edge.runtime.load import open_trusted

    if report is not None:
        require_extra("jinja2", "train")
    bundle = open_trusted(model)
    measured = measure_latency(
        bundle,
        precision,
        engine=engine,
        frame_hw=_parse_size(frame_size),
        frames=frames,
        threads=threads,
        deadline_s=None if deadline_ms is None else deadline_ms / 1e3,
        batches=[] if batches is None else _parse_counts("--batches", batches),
    )
    environment = describe_environment()
    if json:
        print_json(
            {
                "model": str(model),
                "model_sha256": bundle.model_sha256(measured.precision),
                **measured.to_dict(),
                "environment": environment,
            }
        )
    else:
        _print_stages(measured, frame_size)
    _say_facts(measured)
    if report is not None:
        from meliad_edge.benchmarks.latency_page import latency_page
        from meliad_edge.report import write_report

        write_report(report, latency_page(measured, model.name, environment))
        say("saved", str(report))


@app.command()
def cameras(
    model: BundleFile,
    json: Json = False,
    counts: Annotated[
        str, typer.Option("--cameras", metavar="1,2,4", help="Numbers of cameras, one measurement each.")
    ] = "1,2,4",
    fps: Annotated[float, typer.Option(min=0.1, max=1000.0, help="Pictures per second of each.")] = 25.0,
    frame_size: Annotated[str, typer.Option(metavar="WxH", help="Size of their pictures.")] = "640x480",
    seconds: Annotated[float, typer.Option(min=1.0, max=3600.0, help="Of each measurement.")] = 10.0,
    deadline_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Count the decisions that come later.", show_default=False)
    ] = None,
    engine: BundleEngine = "auto",
    precision: BundlePrecision = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine.  [default: every core]")] = None,
) -> None:
    """Measure from the picture to the decision over a stream: cameras that film a clock, more and more of them."""
    from meliad_edge.benchmarks.camera_latency import measure_cameras
    from meliad_edge.benchmarks.environment import describe_environment
    from meliad_edge.runtime.load import open_trusted

    measured = measure_cameras(
        open_trusted(model),
        precision,
        _parse_counts("--cameras", counts),
        engine=engine,
        threads=threads,
        fps=fps,
        frame_hw=_parse_size(frame_size),
        seconds=seconds,
        deadline_s=None if deadline_ms is None else deadline_ms / 1e3,
    )
    if json:
        print_json(
            {
                "model": str(model),
                "measurements": [one.to_dict() for one in measured],
                "environment": describe_environment(),
            }
        )
        return
    print_table(
        ("cameras", "offered/s", "scored/s", "batch", "p50", "p90", "p95", "p99", "p99.9", "infer", "late"),
        [
            (
                str(one.cameras),
                f"{one.offered_fps:.0f}",
                f"{one.scored_fps:.1f}",
                str(one.batch_size),
                *(f"{1e3 * s:.1f}" for s in (v.p50_s, v.p90_s, v.p95_s, v.p99_s, v.p999_s, one.infer.p50_s)),
                "" if one.missed is None else str(one.missed),
            )
            for one in measured
            for v in [one.glass_to_decision]
        ],
        caption=f"ms from the picture to its decision, and of the engine (p50); Motion JPEG of {frame_size} over HTTP, "
        "made and sent by this machine",
    )


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE.json", help="What bench --json printed.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER.json", help="The same, later or elsewhere.")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="How much slower still passes, as a fraction.")
    ] = 0.05,
    json: Json = False,
) -> None:
    """Compare two reports; fails where a stage that counts became slower than the tolerance and chance allow."""
    from meliad_edge.benchmarks.compare import compare_reports, read_report, require_no_regression

    first, second = read_report(before), read_report(after)
    result = compare_reports(first, second, tolerance)
    if json:
        print_json(result.to_dict())
    else:
        print_table(
            ("p50, ms", "before", "after", "ratio", "95 % interval", "verdict"),
            [
                (
                    stage.stage,
                    f"{1e3 * stage.before_s:.3f}",
                    f"{1e3 * stage.after_s:.3f}",
                    f"{stage.ratio:.3f}",
                    f"{stage.low:.3f} to {stage.high:.3f}",
                    stage.verdict,
                )
                for stage in result.stages
            ],
            caption=f"interval: bootstrap over blocks of frames; a stage of at least a twentieth of the total that is "
            f"slower by more than {tolerance:.0%} fails; infer and score are parts of engine and fail with it alone",
        )
    for difference in result.differences:
        say("warning", difference)
    require_no_regression(result)


@app.command()
def limit(
    model: BundleFile,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of 20 frames.")] = 12,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine.  [default: every core]")] = None,
    json: Json = False,
) -> None:
    """Measure the bare backbone, memory and arithmetic in the same run, and how far from them each stage is."""
    require_extra("torch", "train")
    require_extra("onnx", "export")
    from meliad_edge.benchmarks import limit as benchmark
    from meliad_edge.runtime.load import open_trusted

    result = benchmark.measure(open_trusted(model), rounds, threads)
    if json:
        print_json(result)
    else:
        for topic, text in benchmark.describe(result):
            typer.echo(f"{topic:<12} {text}")


def _print_stages(measured: LatencyReport, frame_size: str) -> None:
    frames = measured.stages["total"].count
    print_table(
        ("ms", "p50", "p90", "p95", "p99", "p99.9", "mean", "CoV", "fps"),
        [
            (
                stage,
                *(f"{1e3 * s:.2f}" for s in (v.p50_s, v.p90_s, v.p95_s, v.p99_s, v.p999_s, v.mean_s)),
                f"{v.cov:.1%}",
                f"{v.throughput_per_s:.1f}",
            )
            for stage, v in measured.stages.items()
        ],
        caption=f"{measured.engine}, {measured.precision}, {frames} frames of {frame_size}, "
        f"percentiles as trtexec defines them; {_describe_infer(measured)}",
    )
    if measured.batches:
        print_table(
            ("batch", "p50 ms", "p99 ms", "frames per second"),
            [
                (str(b.batch), f"{1e3 * b.p50_s:.2f}", f"{1e3 * b.p99_s:.2f}", f"{b.frames_per_s:.1f}")
                for b in measured.batches
            ],
            caption="the engine alone, frames already at model size",
        )


def _say_facts(measured: LatencyReport) -> None:
    say("start", f"session ready in {measured.cold_start_s:.2f} s, first frame {1e3 * measured.first_frame_s:.1f} ms")
    if measured.deadline_s is not None:
        missed, frames = measured.deadline_misses, measured.stages["total"].count
        say("deadline", f"{missed} of {frames} frames took longer than {1e3 * measured.deadline_s:g} ms")
    if measured.energy_per_frame_j is not None:
        say("energy", f"{1e3 * measured.energy_per_frame_j:.1f} mJ per frame, of the whole module or processor")
    for warning in measured.warnings:
        say("warning", f"do not quote these: {warning}")


def _describe_infer(measured: LatencyReport) -> str:
    if "score" in measured.stages:
        return "infer and score are the engine's time, split by its profile"
    return "infer is the engine's time, the scoring included"


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{2,4})x([0-9]{2,4})", text)
    if match is None or min(width := int(match[1]), height := int(match[2])) < 16:
        msg = f"--frame-size takes WIDTHxHEIGHT in pixels, 16x16 to 9999x9999, got {text!r}; for example 640x480"
        raise UsageError(msg)
    return height, width


def _parse_counts(option: str, text: str) -> list[int]:
    if not re.fullmatch(r"[0-9]{1,3}(,[0-9]{1,3})*", text) or not all(1 <= int(n) <= 256 for n in text.split(",")):
        msg = f"{option} takes numbers between 1 and 256, got {text!r}; for example 1,2,4,8"
        raise UsageError(msg)
    return [int(n) for n in text.split(",")]
