"""The whole line on real solar cells: fit, evaluate, export, check, watch a video of held-out cells, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from meliad_edge.benchmarks.latency import LatencyReport, measure_latency
from meliad_edge.bundle import open_bundle
from meliad_edge.config import FitConfig
from meliad_edge.evaluate import Evaluation, evaluate
from meliad_edge.evaluation_report import evaluation_report
from meliad_edge.events import Event
from meliad_edge.export.to_bundle import export_bundle
from meliad_edge.parity import ParityResult
from meliad_edge.progress import progress_bar
from meliad_edge.report import ReportData, Table, write_report
from meliad_edge.run import Run
from meliad_edge.runtime.load import load_predictor
from meliad_edge.stream.sources import open_source
from meliad_edge.stream.uri import parse_source
from meliad_edge.stream.watcher import Camera, Watcher, WatchSummary
from meliad_edge.train import fit

_CELLS_PER_KIND = 12
_FRAMES_PER_CELL = 12
_FRAMES_PER_SECOND = 12
_SHOTS = 10


@dataclass(frozen=True, slots=True)
class Scene:
    """One held-out cell in the video.

    Attributes:
        name: File name of the cell.
        defect: ``"good"`` or its class.
        first_frame: Number of the first frame that shows it.
        last_frame: Number of the last.
    """

    name: str
    defect: str
    first_frame: int
    last_frame: int


def run_demo(out: Path, report: Callable[[str, str], None]) -> Path:
    """Run every step and write its results under one folder.

    Args:
        out: Folder for the run, the bundle, the video, the events and the report.
        report: Receives a topic and a sentence for each step.

    Returns:
        The HTML report.
    """
    run = fit(FitConfig(data="elpv", shots=_SHOTS), out / "run", report)
    evaluation = evaluate(run)
    low, high = evaluation.image.image_auroc_ci
    report(
        "accuracy",
        f"image AUROC {evaluation.image.image_auroc:.3f} ({low:.3f} to {high:.3f}) "
        f"on {len(evaluation.is_anomaly):,} held-out cells",
    )
    report(
        "decisions",
        f"at threshold {run.calibration.threshold:.2f}, for {run.config.false_alarm_rate:.0%} false alarms: "
        f"{evaluation.false_alarms} alarms on good cells, {evaluation.misses} defects missed",
    )
    model = out / "solar.meliad"
    parity = export_bundle(run, model)[1].parity
    flips = sum(len(result.label_flips) for result in parity)
    report(
        "export",
        f"{model} ({model.stat().st_size / 1e6:.1f} MB), {flips} decisions changed on {parity[0].frames} frames",
    )
    video = out / "held_out.avi"
    scenes = write_video(run, evaluation, video)
    events, summary = _watch(model, video)
    hits, false_alarms = (
        sum(_is_seen(scene, events) for scene in scenes if (scene.defect == "good") == is_good)
        for is_good in (False, True)
    )
    report(
        "watch",
        f"{video.name}: {summary.frames.scored} frames at {summary.throughput_fps:.0f} per second, {hits} of "
        f"{_CELLS_PER_KIND} defective and {false_alarms} of {_CELLS_PER_KIND} good cells raised an alarm",
    )
    latency = measure_latency(open_bundle(model), "fp32", frames=100)
    total = latency.stages["total"]
    report(
        "latency",
        f"file to decision p50 {1e3 * total.p50_s:.1f} ms, p99 {1e3 * total.p99_s:.1f} ms on {latency.engine}",
    )
    page = out / "report.html"
    write_report(page, _report_data(run, evaluation, parity, latency, scenes, events, summary))
    return page


def write_video(run: Run, evaluation: Evaluation, path: Path) -> list[Scene]:
    """Film held-out cells, good and defective in turn; which ones is drawn with the run's seed, whatever their score.

    The codec is lossless: compression is a change of the camera that the threshold was not calibrated for.
    """
    rng = np.random.default_rng(run.config.seed)
    good, defective = (
        rng.permutation(np.flatnonzero(evaluation.is_anomaly == kind))[:_CELLS_PER_KIND] for kind in (False, True)
    )
    height, width = run.network.input_hw
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"FFV1"), _FRAMES_PER_SECOND, (width, height))
    scenes: list[Scene] = []
    for index in np.stack([good, defective], axis=1).flat:
        sample = evaluation.images.samples[index]
        first = len(scenes) * _FRAMES_PER_CELL
        scenes.append(Scene(sample.path.name, sample.defect, first, first + _FRAMES_PER_CELL - 1))
        picture = cv2.cvtColor(evaluation.images.frames[index], cv2.COLOR_RGB2BGR)
        for _ in range(_FRAMES_PER_CELL):
            writer.write(picture)
    writer.release()
    return scenes


def _watch(model: Path, video: Path) -> tuple[list[Event], WatchSummary]:
    last_states: dict[str, Event] = {}
    with progress_bar() as bar:
        task = bar.add_task(f"{'watching':<24}", total=2 * _CELLS_PER_KIND * _FRAMES_PER_CELL, note="")
        watcher = Watcher(
            load_predictor(model),
            [Camera(open_source(parse_source(str(video))))],
            on_event=lambda event: last_states.__setitem__(event.id, event),
            on_notice=lambda name, text: None,
            on_failure=_raise,
            on_decision=lambda decision: bar.advance(task),
        )
        watcher.run()
    return list(last_states.values()), watcher.summary()


def _raise(name: str, error: Exception) -> None:
    raise error


def _is_seen(scene: Scene, events: list[Event]) -> bool:
    return any(
        event.first_frame is not None
        and event.last_frame is not None
        and event.first_frame <= scene.last_frame
        and event.last_frame >= scene.first_frame
        for event in events
    )


def _report_data(
    run: Run,
    evaluation: Evaluation,
    parity: Sequence[ParityResult],
    latency: LatencyReport,
    scenes: list[Scene],
    events: list[Event],
    summary: WatchSummary,
) -> ReportData:
    return dataclasses.replace(
        evaluation_report(run, evaluation),
        title="meliad-edge demo: defects in solar cells",
        parity=Table(
            "Decision parity: the exported model against the trained one",
            ("engine", "frames", "label flips", "rank swaps", "score error, %", "map error, %"),
            tuple(
                (r.engine, r.frames, len(r.label_flips), r.rank_swaps, 100 * r.score_error, 100 * r.map_error)
                for r in parity
            ),
            "Errors in per cent of the distance from the typical normal score to the threshold.",
        ),
        latency=_latency_table(latency, summary),
        events=_events_table(scenes, events),
    )


def _latency_table(latency: LatencyReport, summary: WatchSummary) -> Table:
    rows = [(f"bench: {stage}", values) for stage, values in latency.stages.items()]
    rows += [(f"watch: {stage.replace('_', ' ')}", values) for stage, values in summary.latencies.items()]
    return Table(
        f"Latency in milliseconds on {latency.engine}",
        ("stage", "p50", "p90", "p95", "p99", "mean"),
        tuple((name, *(1e3 * s for s in (v.p50_s, v.p90_s, v.p95_s, v.p99_s, v.mean_s))) for name, v in rows),
        "bench: one JPEG of 640 x 480 after the other, file to decision. watch: the video of held-out cells, decoding "
        "in a thread of its own. GPUs and Jetson devices: not measured.",
    )


def _events_table(scenes: list[Scene], events: list[Event]) -> Table:
    rows = []
    for scene in scenes:
        seen = [event for event in events if _is_seen(scene, [event])]
        score = max((event.peak_score for event in seen if event.peak_score is not None), default=None)
        rows.append(
            (
                scene.name,
                scene.defect,
                f"{scene.first_frame} to {scene.last_frame}",
                "event" if seen else "quiet",
                "" if score is None else f"{score:.2f}",
            )
        )
    return Table(
        "What watch said of each cell in the video",
        ("cell", "truth", "frames", "watch", "peak score"),
        tuple(rows),
        "An event begins when 3 of 5 frames are at or above the threshold and ends after 5 that are not; "
        "neighbours that both alarm share one.",
    )
