"""What the HTML report shows of an evaluated run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meliad_edge import __version__, charts
from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.data.input_size import in_words
from meliad_edge.evaluate import Evaluation
from meliad_edge.explain import overlay
from meliad_edge.faithfulness import RANDOMISED_LIMIT
from meliad_edge.interpretability import Interpretability
from meliad_edge.metrics import Interval
from meliad_edge.models import create_detector
from meliad_edge.models.network import FrozenBackboneNetwork
from meliad_edge.report import HeldOutScores, InspectedImage, ReportData, Table
from meliad_edge.run import Run
from meliad_edge.runtime.predictor import Region, find_regions
from meliad_edge.runtime.view import Box

_GALLERY_PER_CLASS = 6
_WORST = 6


def evaluation_report(run: Run, evaluation: Evaluation) -> ReportData:
    """Collect figures, a gallery and the worst mistakes of an evaluation.

    The gallery takes images at even steps through the scores of each class, so that it shows typical ones and
    not a selection that flatters.
    """
    normal = np.flatnonzero(~evaluation.is_anomaly)
    anomalous = np.flatnonzero(evaluation.is_anomaly)
    by_score = np.argsort(evaluation.raw.score, kind="stable")
    gallery = [
        *_even_steps(by_score[np.isin(by_score, anomalous)][::-1], _GALLERY_PER_CLASS),
        *_even_steps(by_score[np.isin(by_score, normal)], _GALLERY_PER_CLASS),
    ]
    measured = evaluation.interpretability
    return ReportData(
        title=f"{run.config.detector} on {run.dataset}",
        subtitle=(
            f"{run.learned_normals:,} normal images and {run.learned_shots} labelled defects to learn from, "
            f"{len(normal):,} normal and {len(anomalous):,} defective images held out"
        ),
        image=evaluation.image,
        pixel=evaluation.pixel,
        test=HeldOutScores(evaluation.raw.score, evaluation.is_anomaly),
        calibration=run.calibration,
        gallery=tuple(_inspect(run, evaluation, index) for index in gallery),
        highest_normals=_worst(run, evaluation, by_score[np.isin(by_score, normal)][::-1], alarms=True),
        lowest_anomalies=_worst(run, evaluation, by_score[np.isin(by_score, anomalous)], alarms=False),
        interpretability=None if measured is None else _interpretability_table(measured),
        faithfulness=None
        if measured is None or measured.curves is None
        else charts.faithfulness_chart(measured.curves),
        provenance=_provenance(run),
    )


def _even_steps(indices: NDArray[np.int64], count: int) -> list[int]:
    steps = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return [int(indices[step]) for step in steps]


def _worst(run: Run, evaluation: Evaluation, ordered: NDArray[np.int64], *, alarms: bool) -> tuple[InspectedImage, ...]:
    """The first of an order that are on the wrong side of the threshold."""
    wrong = [int(i) for i in ordered if (evaluation.raw.score[i] >= run.calibration.threshold) == alarms]
    return tuple(_inspect(run, evaluation, index) for index in wrong[:_WORST])


def _inspect(run: Run, evaluation: Evaluation, index: int) -> InspectedImage:
    sample, frame = evaluation.images.samples[index], evaluation.images.frames[index]
    raw, calibration = evaluation.raw, run.calibration
    regions: tuple[Region, ...] = ()
    if raw.score[index] >= calibration.threshold:
        whole = Box(0, 0, frame.shape[1], frame.shape[0])
        regions = find_regions(raw.map[index], raw.nearest[index], whole, calibration, run.exemplars)
    return InspectedImage(
        name=sample.path.name,
        defect=sample.defect,
        is_anomaly=sample.is_anomaly,
        score=float(raw.score[index]),
        image=frame,
        overlay=overlay(frame, raw.map[index], calibration.colour_range, regions),
        mask=evaluation.masks.get(index),
        resembles=tuple(region.resembles for region in regions[:2] if region.resembles is not None),
    )


def _interpretability_table(measured: Interpretability) -> Table:
    """What could be measured, each beside what a map without meaning would get."""
    rows: list[tuple[str | float, ...]] = []
    if measured.pointing is not None:
        pointing = measured.pointing
        rows.append(
            (
                "highest point is on the defect",
                pointing.accuracy,
                _range(pointing.accuracy_ci),
                f"chance {pointing.chance:.3f}",
            )
        )
    if measured.overlap is not None:
        overlap = measured.overlap
        rows += [
            ("IoU at the cell threshold", overlap.iou, _range(overlap.iou_ci), ""),
            ("IoU at the best threshold", overlap.iou_best, _range(overlap.iou_best_ci), ""),
            ("masks touched by a marked cell", overlap.touched, "", ""),
        ]
    if measured.curves is not None:
        curves = measured.curves
        rows += [
            (
                "deletion, lower is better",
                curves.area(curves.deletion),
                "",
                _random(curves.area(curves.deletion_random)),
            ),
            (
                "insertion, higher is better",
                curves.area(curves.insertion),
                "",
                _random(curves.area(curves.insertion_random)),
            ),
        ]
    verdict = "passed" if measured.randomised.passed else "failed"
    rows.append(
        (
            "rank correlation with random weights",
            measured.randomised.correlation,
            "",
            f"limit {RANDOMISED_LIMIT}, {verdict}",
        )
    )
    return Table(
        f"Maps of {measured.masked_anomalies:,} defects with a mask, "
        f"{0 if measured.curves is None else measured.curves.images} for the curves, "
        f"{measured.randomised.images} for the random weights",
        ("measure", "value", "95 % interval", "compare with"),
        tuple(rows),
        note="docs/method.md defines each measure. Without masks, or without an alarm, some cannot be measured.",
    )


def _range(interval: Interval) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _random(area: float) -> str:
    return f"random order {area:.3f}"


def _backbone(run: Run) -> str:
    if not create_detector(run.config.detector, run.config.options).strides:
        return "none"
    training = "frozen" if isinstance(run.network, FrozenBackboneNetwork) else "fine-tuned"
    return f"{run.config.backbone}, {training}, weights: {run.config.weights or 'ImageNet'}"


def _provenance(run: Run) -> tuple[tuple[str, str], ...]:
    environment = describe_environment()
    config = run.config
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    facts = {name: value for name, value in run.facts.items() if name != "input_hw"}
    return (
        (
            "made by",
            f"meliad-edge {__version__}" + (f", commit {environment['commit']}" if environment["commit"] else ""),
        ),
        ("date", environment["date"]),
        ("data set", f"{run.dataset}; licence: {run.licence}"),
        (
            "settings",
            f"detector {config.detector}, {config.shots} shots, seed {config.seed}, "
            f"{in_words(run.network.input_hw)} pixels",
        ),
        ("backbone", _backbone(run)),
        ("fit", ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in facts.items())),
        ("machine", f"{environment['cpu']}, {environment['cores']} cores, {environment['system']}"),
        ("packages", packages),
    )
