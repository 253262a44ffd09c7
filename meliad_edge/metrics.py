"""Image and pixel metrics of raw scores, named as in anomalib, each with a bootstrap confidence interval.

All of them are functions of the same thing: how many positives and negatives there are at each distinct score,
highest score first. Every metric is then a cumulative sum along the last axis, vectorised over bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from meliad_edge.errors import DataError

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]
Interval = tuple[float, float]

CONFIDENCE = 0.95
RESAMPLES = 1000
EXACT_PIXELS = 2**22
_BINS = 2**16
_BOOTSTRAP_BINS = 2**11


@dataclass(frozen=True, slots=True)
class ImageMetrics:
    """How well the image scores separate anomalous from normal test images.

    Attributes:
        image_auroc: Area under the ROC curve, in [0, 1].
        image_ap: Average precision, in [0, 1]; chance level is the share of anomalies.
        image_f1_max: Largest F1 score over all thresholds, in [0, 1].
        image_auroc_ci, image_ap_ci, image_f1_max_ci: 95 % stratified percentile bootstrap intervals.
        image_f1_max_threshold: Raw score at or above which ``image_f1_max`` is reached; chosen on the test set,
            so it describes the metric and is not the threshold to run with.
        test_normals, test_anomalies: Number of images of each kind.
    """

    image_auroc: float
    image_ap: float
    image_f1_max: float
    image_auroc_ci: Interval
    image_ap_ci: Interval
    image_f1_max_ci: Interval
    image_f1_max_threshold: float
    test_normals: int
    test_anomalies: int

    def to_dict(self) -> dict[str, Any]:
        """Flat dictionary for JSON; intervals as ``[low, high]``."""
        return _flat(asdict(self))


@dataclass(frozen=True, slots=True)
class PixelMetrics:
    """How well the maps mark the defective pixels, pooled over all test images.

    Every metric is None when ``pixel_absent_because`` says why it does not exist.

    Attributes:
        pixel_auroc: Area under the ROC curve over pixels, in [0, 1].
        pixel_ap: Average precision over pixels, in [0, 1].
        aupro_30, aupro_05: Area under the per-region-overlap curve up to a false-positive rate of 0.30 and 0.05,
            divided by that rate, in [0, 1].
        pixel_auroc_ci, pixel_ap_ci, aupro_30_ci, aupro_05_ci: 95 % percentile bootstrap intervals over images,
            stratified into images with and without a defective pixel.
        test_masks: Number of images with at least one defective pixel.
        pixel_absent_because: Reason when there are no metrics, else None.
    """

    pixel_auroc: float | None = None
    pixel_ap: float | None = None
    aupro_30: float | None = None
    aupro_05: float | None = None
    pixel_auroc_ci: Interval | None = None
    pixel_ap_ci: Interval | None = None
    aupro_30_ci: Interval | None = None
    aupro_05_ci: Interval | None = None
    test_masks: int = 0
    pixel_absent_because: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Flat dictionary for JSON; intervals as ``[low, high]``, what is absent as None."""
        return _flat(asdict(self))


def image_metrics(
    scores: ArrayLike, is_anomaly: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES
) -> ImageMetrics:
    """Measure image scores against labels.

    The bootstrap resamples normal and anomalous images separately (Efron & Tibshirani, 1993). A percentile
    interval cannot reach beyond what was seen: where the classes are fully separated it is [1, 1].

    Args:
        scores: Raw scores, [n]; higher is more anomalous.
        is_anomaly: True for anomalous images, [n].
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap resamples.

    Raises:
        DataError: Only one class, scores that are not finite, or lengths that differ.
    """
    values, labels, starts = _ranked(scores, is_anomaly)
    copies = np.vstack([np.ones(len(labels)), _stratified_copies(labels, seed, resamples)])
    positives, negatives = (np.add.reduceat(copies * kind, starts, axis=1) for kind in (labels, ~labels))
    f1 = _f1(positives, negatives)
    auroc, auroc_ci = _estimate(_auroc(positives, negatives))
    ap, ap_ci = _estimate(_average_precision(positives, negatives))
    f1_max, f1_max_ci = _estimate(f1.max(axis=1))
    return ImageMetrics(
        image_auroc=auroc,
        image_ap=ap,
        image_f1_max=f1_max,
        image_auroc_ci=auroc_ci,
        image_ap_ci=ap_ci,
        image_f1_max_ci=f1_max_ci,
        image_f1_max_threshold=float(values[starts[int(np.argmax(f1[0]))]]),
        test_normals=int(np.count_nonzero(~labels)),
        test_anomalies=int(np.count_nonzero(labels)),
    )


def auroc_difference(
    before: ArrayLike, after: ArrayLike, is_anomaly: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, Interval]:
    """Image AUROC of a second model minus that of a first on the same images, with its bootstrap interval.

    Both models see the same resamples, so what they have in common cancels.

    Args:
        before: Raw scores of the first model, [n].
        after: Raw scores of the second, [n].
        is_anomaly: True for anomalous images, [n].
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap resamples.

    Raises:
        DataError: As :func:`image_metrics`.
    """
    labels = np.asarray(is_anomaly, dtype=bool)
    copies = np.vstack([np.ones(len(labels)), _stratified_copies(labels, seed, resamples)])
    return _estimate(_resampled_auroc(after, labels, copies) - _resampled_auroc(before, labels, copies))


def roc_curve(scores: ArrayLike, is_anomaly: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """False- and true-positive rate at every distinct score, from (0, 0) to (1, 1).

    Raises:
        DataError: As :func:`image_metrics`.
    """
    hits, alarms = _cumulative_counts(scores, is_anomaly)
    return np.concatenate([[0.0], alarms / alarms[-1]]), np.concatenate([[0.0], hits / hits[-1]])


def precision_recall_curve(scores: ArrayLike, is_anomaly: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Recall and precision at every distinct score, highest score first.

    Raises:
        DataError: As :func:`image_metrics`.
    """
    hits, alarms = _cumulative_counts(scores, is_anomaly)
    return hits / hits[-1], hits / (hits + alarms)


def pixel_metrics(
    maps: Sequence[NDArray[Any]], masks: Sequence[NDArray[Any]], *, seed: int = 0, resamples: int = RESAMPLES
) -> PixelMetrics:
    """Measure maps against ground-truth masks, pooled over all images, normal ones with empty masks included.

    AUPRO follows Bergmann et al. (IJCV 2021): the mean over the 8-connected regions of all masks of the share of
    the region that is marked, against the false-positive rate over all normal pixels, integrated by trapezoids.

    Up to ``EXACT_PIXELS`` (4.2 million) pixels every distinct value is its own level and the result is exact.
    Above, values fall into at most 65,536 bins whose edges are quantiles of all and of the defective pixels, and
    the pixels of one bin count as ties. Apart from equal values, a bin holds about 1/32,768 of all pixels at most,
    which bounds the error of ``pixel_auroc`` to about 2e-5 and that of AUPRO to about 3e-5 / limit while most
    pixels are normal; that of ``pixel_ap`` is below 1e-3. The intervals are computed from 2,048 such bins.

    Args:
        maps: One map per image, [H, W], at the size of its mask; higher is more anomalous. Sizes may differ
            between images. May be lazy: it is read three times, one map at a time.
        masks: One mask per image, [H, W]; non-zero is defective. Leave out images whose mask is unknown.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap resamples.

    Raises:
        DataError: No images, numbers or sizes of maps and masks that differ, or map values that are not finite.
    """
    pixels, defective_pixels = _checked_pixel_counts(maps, masks)
    if defective_pixels in (0, pixels):
        kind = "normal" if defective_pixels else "defective"
        reason = f"the masks of the {len(maps)} test images have no {kind} pixel"
        return PixelMetrics(test_masks=len(maps) if defective_pixels else 0, pixel_absent_because=reason)
    levels, bins = _pixel_levels(maps, masks, pixels, defective_pixels)
    bin_of_level = _level_of(levels, bins)
    # Rows: defective pixels, normal pixels, and the sum over regions of the share of each region.
    counts = np.zeros((3, len(levels)))
    image_counts = np.zeros((3, len(maps), len(bins)), np.float32)
    regions = np.zeros(len(maps))
    for index, (values, defective) in enumerate(_pairs(maps, masks)):
        shares, regions[index] = _region_shares(defective)
        hits = _level_of(values[defective], levels)
        alarms = _level_of(np.sort(values[~defective]), levels)  # sorted values are found three times as fast
        for row, (where, weights) in enumerate(((hits, None), (alarms, None), (hits, shares))):
            np.add.at(counts[row], where, 1.0 if weights is None else weights)
            image_counts[row, index] = np.bincount(bin_of_level[where], weights, minlength=len(bins))
    auroc, ap, aupro_30, aupro_05 = _pixel_measures(counts[:, np.newaxis, ::-1], regions.sum(keepdims=True))
    copies = _stratified_copies(regions > 0, seed, resamples)
    # Where one image is defective all over, a resample may have no normal pixel; the whole set takes its place.
    copies[copies @ image_counts[1].sum(axis=1) == 0] = 1.0
    resampled = np.matmul(copies.astype(np.float32), image_counts[..., ::-1]).astype(np.float64)
    auroc_ci, ap_ci, aupro_30_ci, aupro_05_ci = map(_interval, _pixel_measures(resampled, copies @ regions))
    return PixelMetrics(
        pixel_auroc=float(auroc[0]),
        pixel_ap=float(ap[0]),
        aupro_30=float(aupro_30[0]),
        aupro_05=float(aupro_05[0]),
        pixel_auroc_ci=auroc_ci,
        pixel_ap_ci=ap_ci,
        aupro_30_ci=aupro_30_ci,
        aupro_05_ci=aupro_05_ci,
        test_masks=int(np.count_nonzero(regions)),
    )


def _estimate(values: FloatArray) -> tuple[float, Interval]:
    """Point estimate (the first value) and the interval of the resampled rest."""
    return float(values[0]), _interval(values[1:])


def _interval(resampled: FloatArray) -> Interval:
    low, high = np.quantile(resampled, [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0])
    return float(low), float(high)


def _stratified_copies(labels: BoolArray, seed: int, resamples: int) -> NDArray[np.float64]:
    """How often each sample occurs in each resample, [resamples, n]; each class keeps its size."""
    generator = np.random.default_rng(seed)
    copies = np.zeros((resamples, len(labels)))
    for kind in (labels, ~labels):
        size = int(np.count_nonzero(kind))
        if size:
            copies[:, kind] = generator.multinomial(size, np.full(size, 1.0 / size), size=resamples)
    return copies


def _ranked(scores: ArrayLike, is_anomaly: ArrayLike) -> tuple[FloatArray, BoolArray, NDArray[np.intp]]:
    """Checked scores, highest first, their labels, and where each run of equal scores starts."""
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(is_anomaly, dtype=bool)
    if values.ndim != 1 or values.shape != labels.shape:
        msg = f"metrics: {values.shape} scores and {labels.shape} labels; give one of each per image"
        raise DataError(msg)
    if not np.isfinite(values).all():
        bad = int(np.count_nonzero(~np.isfinite(values)))
        msg = f"metrics: {bad} of {len(values)} scores are not finite; fit the model again"
        raise DataError(msg)
    anomalies = int(np.count_nonzero(labels))
    if anomalies in (0, len(labels)):
        msg = (
            f"metrics need normal and anomalous test images, got {len(labels) - anomalies} and {anomalies}; "
            "add the missing kind to test/"
        )
        raise DataError(msg)
    order = np.argsort(-values, kind="stable")
    values, labels = values[order], labels[order]
    return values, labels, np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))


def _resampled_auroc(scores: ArrayLike, is_anomaly: BoolArray, copies: NDArray[np.float64]) -> FloatArray:
    """AUROC of each resample; ``copies`` are in the order of the scores, [resamples, n]."""
    _, labels, starts = _ranked(scores, is_anomaly)
    ranked = copies[:, np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")]
    positives, negatives = (np.add.reduceat(ranked * kind, starts, axis=1) for kind in (labels, ~labels))
    return _auroc(positives, negatives)


def _cumulative_counts(scores: ArrayLike, is_anomaly: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Anomalies and normals at or above each distinct score, highest score first."""
    _, labels, starts = _ranked(scores, is_anomaly)
    hits, alarms = (np.cumsum(np.add.reduceat(kind.astype(float), starts)) for kind in (labels, ~labels))
    return hits, alarms


# The metrics. Arrays are [..., levels], highest score first.


def _auroc(positives: FloatArray, negatives: FloatArray) -> FloatArray:
    """Share of pairs in which the positive is above the negative, equal ones counting half."""
    normals = negatives.sum(axis=-1)
    below = normals[..., np.newaxis] - np.cumsum(negatives, axis=-1)
    pairs = np.sum(positives * (below + 0.5 * negatives), axis=-1)
    return np.asarray(pairs / (positives.sum(axis=-1) * normals))


def _average_precision(positives: FloatArray, negatives: FloatArray) -> FloatArray:
    """Precision at each level, weighted by the recall that the level adds; no interpolation."""
    hits = np.cumsum(positives, axis=-1)
    # A resample may have nothing yet at its first levels; they add no recall either.
    precision = hits / np.maximum(hits + np.cumsum(negatives, axis=-1), 1.0)
    return np.asarray(np.sum(positives * precision, axis=-1) / hits[..., -1])


def _f1(positives: FloatArray, negatives: FloatArray) -> FloatArray:
    """F1 score at each level, [..., levels]."""
    hits = np.cumsum(positives, axis=-1)
    return np.asarray(2.0 * hits / (hits + np.cumsum(negatives, axis=-1) + hits[..., -1:]))


def _aupro(overlap: FloatArray, negatives: FloatArray, limit: float) -> FloatArray:
    """Area under region overlap [0, 1] against false-positive rate up to ``limit``, divided by it."""
    alarms = np.cumsum(negatives, axis=-1)
    end = alarms / alarms[..., -1:]
    start = end - negatives / alarms[..., -1:]
    reached = np.cumsum(overlap, axis=-1)
    width = np.maximum(np.minimum(end, limit) - start, 0.0)
    # Where the limit cuts a step, the overlap at the limit is interpolated.
    share = np.divide(width, end - start, out=np.zeros_like(width), where=end > start)
    height = reached - overlap + 0.5 * overlap * share
    return np.asarray(np.sum(width * height, axis=-1) / limit)


def _pixel_measures(counts: FloatArray, regions: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """AUROC, AP, AUPRO at 0.30 and 0.05 of counts [3, resamples, levels] and numbers of regions [resamples]."""
    positives, negatives, shares = counts
    overlap = shares / regions[:, np.newaxis]
    return (
        _auroc(positives, negatives),
        _average_precision(positives, negatives),
        _aupro(overlap, negatives, 0.30),
        _aupro(overlap, negatives, 0.05),
    )


def _pairs(maps: Sequence[NDArray[Any]], masks: Sequence[NDArray[Any]]) -> Iterator[tuple[FloatArray, BoolArray]]:
    for index in range(len(maps)):
        yield np.asarray(maps[index]), np.asarray(masks[index]) != 0


def _checked_pixel_counts(maps: Sequence[NDArray[Any]], masks: Sequence[NDArray[Any]]) -> tuple[int, int]:
    """Numbers of all and of defective pixels."""
    if len(maps) != len(masks) or len(maps) == 0:
        msg = f"pixel metrics: {len(maps)} maps and {len(masks)} masks; give one of each per image"
        raise DataError(msg)
    pixels = defective_pixels = 0
    for index, (values, defective) in enumerate(_pairs(maps, masks)):
        if values.ndim != 2 or values.shape != defective.shape:
            msg = (
                f"pixel metrics: map {index} is {values.shape}, its mask {defective.shape}; resize the map to the mask"
            )
            raise DataError(msg)
        if not np.isfinite(values).all():
            msg = f"pixel metrics: map {index} has values that are not finite; fit the model again"
            raise DataError(msg)
        pixels += values.size
        defective_pixels += int(np.count_nonzero(defective))
    return pixels, defective_pixels


def _pixel_levels(
    maps: Sequence[NDArray[Any]], masks: Sequence[NDArray[Any]], pixels: int, defective_pixels: int
) -> tuple[FloatArray, FloatArray]:
    """Ascending levels for the metrics and coarser ones for the bootstrap."""
    generator = np.random.default_rng(0)

    def sample(values: FloatArray, total: int) -> FloatArray:
        if total <= EXACT_PIXELS:
            return values
        return values[generator.integers(0, len(values), len(values) * EXACT_PIXELS // total)]

    sampled, sampled_defective = [], []
    for values, defective in _pairs(maps, masks):
        sampled.append(sample(values.ravel(), pixels))
        sampled_defective.append(sample(values[defective], defective_pixels))
    ordered, ordered_defective = np.sort(np.concatenate(sampled)), np.sort(np.concatenate(sampled_defective))

    def quantiles(count: int) -> FloatArray:
        halves = (o[np.linspace(0, len(o) - 1, count // 2).astype(np.intp)] for o in (ordered, ordered_defective))
        return np.unique(np.concatenate(list(halves)))

    levels = np.unique(ordered) if pixels <= EXACT_PIXELS else quantiles(_BINS)
    return levels, quantiles(_BOOTSTRAP_BINS)


def _level_of(values: FloatArray, levels: FloatArray) -> NDArray[np.intp]:
    """Index of the highest level at or below each value; a value below all levels joins the lowest."""
    return np.maximum(np.searchsorted(levels, values, side="right") - 1, 0)


def _region_shares(defective: BoolArray) -> tuple[FloatArray, int]:
    """One over the size of its region for each defective pixel, in raster order, and the number of regions."""
    count, labels = cv2.connectedComponents(defective.astype(np.uint8), connectivity=8)
    sizes = np.bincount(labels.ravel(), minlength=count)
    return 1.0 / sizes[labels[defective]], count - 1


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
