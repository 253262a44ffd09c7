"""``meliad-edge bench``: latency of a bundle on this machine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from meliad_edge.cli.options import BundleEngine, BundleFile, BundlePrecision, Json
from meliad_edge.cli.output import print_json, print_table, say
from meliad_edge.errors import UsageError

if TYPE_CHECKING:
    from meliad_edge.benchmarks.latency import LatencyReport


def command(
    model: BundleFile,
    json: Json = False,
    frames: Annotated[int, typer.Option(min=10, help="Frames to measure after the warm-up.")] = 200,
    frame_size: Annotated[str, typer.Option(metavar="WxH", help="Size of the frames that are decoded.")] = "640x480",
    engine: BundleEngine = "auto",
    precision: BundlePrecision = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine.  [default: every core]")] = None,
) -> None:
    """Measure a bundle's latency: capture, decode, preprocess, infer, score, post."""
    from meliad_edge.benchmarks.environment import describe_environment
    from meliad_edge.benchmarks.latency import UNSTABLE_COV, measure_latency
    from meliad_edge.runtime.load import open_trusted

    bundle = open_trusted(model)
    report = measure_latency(
        bundle, precision, engine=engine, frame_hw=_parse_size(frame_size), frames=frames, threads=threads
    )
    if json:
        print_json(
            {
                "model": str(model),
                "model_sha256": bundle.model_sha256(report.precision),
                **report.to_dict(),
                "environment": describe_environment(),
            }
        )
    else:
        print_table(
            ("stage", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "mean ms", "CoV", "per second"),
            [
                (
                    stage,
                    *(f"{1e3 * s:.2f}" for s in (v.p50_s, v.p90_s, v.p95_s, v.p99_s, v.mean_s)),
                    f"{v.cov:.1%}",
                    f"{v.throughput_per_s:.1f}",
                )
                for stage, v in report.stages.items()
            ],
            caption=f"{report.engine}, {report.precision}, {frames} frames of {frame_size}, "
            f"percentiles as trtexec defines them; {_describe_infer(report)}",
        )
        say("start", f"session ready in {report.cold_start_s:.2f} s, first frame {1e3 * report.first_frame_s:.1f} ms")
    if not report.is_stable:
        say(
            "warning",
            f"spread of infer {report.stages['infer'].cov:.1%} is above {UNSTABLE_COV:.1%}: do not quote these",
        )


def _describe_infer(report: LatencyReport) -> str:
    if "score" in report.stages:
        return "infer and score are the engine's time, split by its profile"
    return "infer is the engine's time, the scoring included"


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{2,4})x([0-9]{2,4})", text)
    if match is None or min(width := int(match[1]), height := int(match[2])) < 16:
        msg = f"--frame-size takes WIDTHxHEIGHT in pixels, 16x16 to 9999x9999, got {text!r}; for example 640x480"
        raise UsageError(msg)
    return height, width
