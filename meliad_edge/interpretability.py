"""How well the maps of a run explain its decisions: agreement with the masks, and faithfulness to the network.

Four measures on the test images of a run, each beside the figure that a map without any meaning would get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.errors import DataError
from meliad_edge.faithfulness import Randomisation, ScoreCurves, nearest_images, randomisation_check, score_curves
from meliad_edge.metrics import CONFIDENCE, RESAMPLES, Interval
from meliad_edge.run import Run
from meliad_edge.runtime.engine import RawScores
from meliad_edge.runtime.torch_engine import TorchEngine

CURVE_IMAGES = 48
RANDOMISED_IMAGES = 16
_THRESHOLDS = 1024
# Share of the largest absolute value below which interpolation, not the map, makes two values differ.
_TIE = 1e-6


@dataclass(frozen=True, slots=True)
class Pointing:
    """The pointing game (Zhang et al., 2018): is the highest point of the map on the defect?

    Attributes:
        accuracy: Share of masked anomalies where it is, in [0, 1].
        accuracy_ci: 95 % bootstrap interval over images.
        chance: What a random point would reach: mean share of the image that the widened masks cover.
    """

    accuracy: float
    accuracy_ci: Interval
    chance: float


@dataclass(frozen=True, slots=True)
class RegionOverlap:
    """Intersection over union of the marked cells and the mask, mean over masked anomalies.

    Attributes:
        iou: At the cell threshold, in [0, 1].
        iou_best: At the one threshold for all images that gives the largest mean.
        iou_ci, iou_best_ci: 95 % bootstrap intervals over images; the best threshold is chosen in each resample.
        best_threshold: Of ``iou_best``; chosen on the test set, so it describes the maps and is not one to run with.
        touched: Share of the masks with a marked cell on them, at the cell threshold.
    """

    iou: float
    iou_ci: Interval
    iou_best: float
    iou_best_ci: Interval
    best_threshold: float
    touched: float


@dataclass(frozen=True, slots=True)
class Interpretability:
    """Everything measured about the maps of a run.

    Attributes:
        masked_anomalies: Anomalous test images with a mask that is not empty.
        pointing, overlap: None without any.
        curves: None where no anomalous test image alarms.
        randomised: The check with random weights.
    """

    masked_anomalies: int
    pointing: Pointing | None
    overlap: RegionOverlap | None
    curves: ScoreCurves | None
    randomised: Randomisation

    def to_dict(self) -> dict[str, Any]:
        """One flat object of JSON values; what could not be measured is None."""
        pointing, overlap, curves, randomised = self.pointing, self.overlap, self.curves, self.randomised
        return {
            "masked_anomalies": self.masked_anomalies,
            "pointing_accuracy": pointing and pointing.accuracy,
            "pointing_accuracy_ci": pointing and list(pointing.accuracy_ci),
            "pointing_chance": pointing and pointing.chance,
            "region_iou": overlap and overlap.iou,
            "region_iou_ci": overlap and list(overlap.iou_ci),
            "region_iou_best": overlap and overlap.iou_best,
            "region_iou_best_ci": overlap and list(overlap.iou_best_ci),
            "region_iou_best_threshold": overlap and overlap.best_threshold,
            "masks_touched": overlap and overlap.touched,
            "deletion_auc": curves and curves.area(curves.deletion),
            "deletion_auc_random": curves and curves.area(curves.deletion_random),
            "insertion_auc": curves and curves.area(curves.insertion),
            "insertion_auc_random": curves and curves.area(curves.insertion_random),
            "curve_images": 0 if curves is None else curves.images,
            "randomised_correlation": randomised.correlation,
            "randomised_images": randomised.images,
            "randomised_unusable_maps": randomised.unusable_maps,
            "randomised_passed": randomised.passed,
        }


def measure_interpretability(
    run: Run,
    frames: NDArray[np.uint8],
    raw: RawScores,
    is_anomaly: NDArray[np.bool_],
    masks: dict[int, NDArray[np.bool_]],
    *,
    seed: int = 0,
) -> Interpretability:
    """Measure the maps of a run on its test images.

    Args:
        run: What made the maps.
        frames: Test images at model size, uint8 RGB [n, H, W, 3], normal ones included.
        raw: Their raw scores and maps.
        is_anomaly: Ground truth, [n].
        masks: Ground-truth masks at model size, by index.
        seed: Of the images drawn, the random orders and the random weights.

    Raises:
        DataError: A map has values that are not finite.
    """
    unusable = int(np.count_nonzero(~np.isfinite(raw.map).all(axis=(1, 2))))
    if unusable:
        msg = (
            f"interpretability: {unusable} of {len(raw.map)} maps have values that are not finite; fit the model again"
        )
        raise DataError(msg)
    masked = [index for index in sorted(masks) if is_anomaly[index] and masks[index].any()]
    masked_maps, masked_masks = [raw.map[index] for index in masked], [masks[index] for index in masked]
    # At a very high false-alarm rate an alarm may score below the typical normal image.
    typical_score = float(np.median(run.calibration.scores))
    explained = is_anomaly & (raw.score >= run.calibration.threshold) & (raw.score > typical_score)
    alarms = _draw(np.flatnonzero(explained), CURVE_IMAGES, seed)
    normals = np.flatnonzero(~is_anomaly)
    typical = normals[np.argsort(raw.score[normals], kind="stable")][: (len(normals) + 1) // 2]
    checked = _draw(np.flatnonzero(is_anomaly), RANDOMISED_IMAGES, seed)
    return Interpretability(
        masked_anomalies=len(masked),
        pointing=pointing_game(masked_maps, masked_masks) if masked else None,
        overlap=region_overlap(masked_maps, masked_masks, run.calibration.cell_threshold) if masked else None,
        curves=score_curves(
            TorchEngine(run.network),  # Without the feature cache: no one will ask for these images again.
            frames[alarms],
            nearest_images(frames[alarms], frames[typical]),
            raw.map[alarms],
            raw.score[alarms],
            typical_score=typical_score,
            seed=seed,
        )
        if len(alarms)
        else None,
        randomised=randomisation_check(run.network, frames[checked], raw.map[checked], seed=seed),
    )


def pointing_game(maps: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]) -> Pointing:
    """Look where each map is highest, enlarged bilinearly to the size of its mask.

    A mask is widened by half a cell of the grid, rounded down, to every side: a cell that touches the defect points at
    it. Where several pixels are highest, the share of them on the mask counts, so a constant map gets chance.

    Args:
        maps: [h, w] each.
        masks: [H, W] each, not empty.
    """
    hits, chances = [], []
    for evidence, mask in zip(maps, masks, strict=True):
        height, width = mask.shape
        reach = tuple(2 * (side // cells // 2) + 1 for side, cells in zip(mask.shape, evidence.shape, strict=True))
        widened = cv2.dilate(mask.astype(np.uint8), np.ones(reach, np.uint8))
        enlarged = cv2.resize(evidence, (width, height), interpolation=cv2.INTER_LINEAR)
        highest = enlarged >= enlarged.max() - _TIE * np.abs(enlarged).max()
        hits.append(float(np.mean(widened[highest])))
        chances.append(float(np.mean(widened)))
    accuracy, interval, _ = _largest_mean(np.array(hits)[:, np.newaxis])
    return Pointing(accuracy, interval, float(np.mean(chances)))


def region_overlap(
    maps: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]], cell_threshold: float
) -> RegionOverlap:
    """Compare the cells at or above a threshold, as whole cells, with the masks.

    The best threshold is a value that a cell on a defect has: between two of them a lower one only adds cells beside
    the defects. All are tried, or 1,024 quantiles where there are more, and the cell threshold.

    Args:
        maps: [h, w] each.
        masks: [H, W] each, not empty.
        cell_threshold: On the scale of the maps.
    """
    # Evidence of every pixel and of the defective ones, sorted.
    pixels, defective = [], []
    for evidence, mask in zip(maps, masks, strict=True):
        enlarged = cv2.resize(evidence, mask.shape[::-1], interpolation=cv2.INTER_NEAREST).astype(np.float64)
        pixels.append(np.sort(enlarged, axis=None))
        defective.append(np.sort(enlarged[mask]))
    candidates = np.unique(np.concatenate(defective))
    if len(candidates) > _THRESHOLDS:
        candidates = candidates[np.linspace(0, len(candidates) - 1, _THRESHOLDS).round().astype(np.intp)]
    thresholds = np.append(candidates, cell_threshold)
    hits = np.array([_count_from(values, thresholds) for values in defective])
    marked = np.array([_count_from(values, thresholds) for values in pixels])
    sizes = np.array([len(values) for values in defective])
    overlaps = hits / (marked + sizes[:, np.newaxis] - hits)
    iou, iou_ci, _ = _largest_mean(overlaps[:, -1:])
    iou_best, iou_best_ci, best = _largest_mean(overlaps)
    return RegionOverlap(iou, iou_ci, iou_best, iou_best_ci, float(thresholds[best]), float(np.mean(hits[:, -1] > 0)))


def _draw(indices: NDArray[np.intp], most: int, seed: int) -> NDArray[np.intp]:
    """At most so many of the indices, in their order."""
    if len(indices) <= most:
        return indices
    return np.sort(np.random.default_rng(seed).choice(indices, most, replace=False))


def _count_from(ordered: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.intp]:
    """How many of the sorted values are at or above each threshold."""
    return len(ordered) - np.searchsorted(ordered, thresholds, side="left")


def _largest_mean(values: NDArray[np.float64]) -> tuple[float, Interval, int]:
    """Largest column mean of [images, columns], its 95 % percentile bootstrap interval over images, and its column."""
    count = len(values)
    copies = np.random.default_rng(0).multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES)
    low, high = np.quantile((copies @ values / count).max(axis=1), [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0])
    means = values.mean(axis=0)
    best = int(np.argmax(means))
    return float(means[best]), (float(low), float(high)), best
