"""What the HTML report shows of an evaluated run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meliad_edge import __version__
from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.evaluate import Evaluation
from meliad_edge.explain import overlay
from meliad_edge.report import HeldOutScores, InspectedImage, ReportData
from meliad_edge.run import Run
from meliad_edge.runtime.predictor import Region, find_regions

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
    shots = len(run.split.shots)
    return ReportData(
        title=f"{run.config.detector} on {run.dataset}",
        subtitle=(
            f"{len(run.split.train_normal):,} normal images and {shots} labelled defects to learn from, "
            f"{len(normal):,} normal and {len(anomalous):,} defective images held out"
        ),
        image=evaluation.image,
        pixel=evaluation.pixel,
        test=HeldOutScores(evaluation.raw.score, evaluation.is_anomaly),
        calibration=run.calibration,
        gallery=tuple(_inspect(run, evaluation, index) for index in gallery),
        highest_normals=_worst(run, evaluation, by_score[np.isin(by_score, normal)][::-1], alarms=True),
        lowest_anomalies=_worst(run, evaluation, by_score[np.isin(by_score, anomalous)], alarms=False),
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
        regions = find_regions(raw.map[index], raw.nearest[index], frame.shape[:2], calibration, run.exemplars)
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


def _provenance(run: Run) -> tuple[tuple[str, str], ...]:
    environment = describe_environment()
    config = run.config
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return (
        (
            "made by",
            f"meliad-edge {__version__}" + (f", commit {environment['commit']}" if environment["commit"] else ""),
        ),
        ("date", environment["date"]),
        ("data set", f"{run.dataset}; licence: {run.licence}"),
        (
            "settings",
            f"detector {config.detector}, {config.shots} shots, seed {config.seed}, {config.image_size} pixels",
        ),
        ("backbone", f"{config.backbone}, frozen, weights: {config.weights or 'ImageNet'}"),
        ("fit", ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in run.facts.items())),
        ("machine", f"{environment['cpu']}, {environment['cores']} cores, {environment['system']}"),
        ("packages", packages),
    )
