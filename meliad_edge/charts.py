"""The charts of the report as SVG geometry: axes with round ticks, paths and markers, styled by the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meliad_edge.metrics import precision_recall_curve, roc_curve

if TYPE_CHECKING:
    from meliad_edge.faithfulness import ScoreCurves

WIDTH, HEIGHT = 440, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 424, 16, 264
_HISTOGRAM_BINS = 40


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: the values at its ends and what is written along it."""

    label: str
    low: float
    high: float

    @property
    def ticks(self) -> tuple[float, ...]:
        """Round values inside the axis, about five of them."""
        raw_step = (self.high - self.low) / 5.0
        magnitude = 10.0 ** math.floor(math.log10(raw_step))
        step = magnitude * min((1.0, 2.0, 5.0, 10.0), key=lambda factor: abs(factor * magnitude - raw_step))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple(index * step for index in range(first, last + 1))


@dataclass(frozen=True, slots=True)
class Series:
    """A path in the plot; ``kind`` is its CSS class and ``label`` its legend entry, if it has one."""

    kind: str
    d: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything one chart shows.

    Attributes:
        name: Identifier, unique in the page.
        title: Heading.
        description: What the chart shows, in words, for those who do not see it.
        x, y: Axes.
        series: Paths, drawn in order.
        marker: A highlighted point in pixels, if any, and its legend entry.
    """

    name: str
    title: str
    description: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    marker: tuple[float, float, str] | None = None

    def x_px(self, value: float) -> float:
        """Horizontal pixel of a value."""
        return _x_px(self.x, value)

    def y_px(self, value: float) -> float:
        """Vertical pixel of a value."""
        return _y_px(self.y, value)


def roc_chart(scores: ArrayLike, is_anomaly: ArrayLike, auroc: float, threshold: float | None) -> Chart:
    """ROC curve, with the operating point of a threshold."""
    alarm_rate, hit_rate = roc_curve(scores, is_anomaly)
    x, y = Axis("normal images that alarm", 0.0, 1.0), Axis("defects found", 0.0, 1.0)
    diagonal = Series("chance", _path(x, y, [0.0, 1.0], [0.0, 1.0]), "chance")
    curve = Series("curve", _path(x, y, alarm_rate, hit_rate))
    marker, operating = None, ""
    if threshold is not None:
        alarms, hits = _rates_at(scores, is_anomaly, threshold)
        marker = (_x_px(x, alarms), _y_px(y, hits), "threshold in use")
        operating = (
            f" At the threshold {hits:.1%} of the defects are found and {alarms:.1%} of the normal images alarm."
        )
    description = (
        f"The share of defects found against the share of normal images that alarm; area {auroc:.3f}.{operating}"
    )
    return Chart("roc", "ROC curve", description, x, y, (diagonal, curve), marker)


def precision_recall_chart(
    scores: ArrayLike, is_anomaly: ArrayLike, average_precision: float, threshold: float | None
) -> Chart:
    """Precision-recall curve in steps, with the operating point of a threshold."""
    recall, precision = precision_recall_curve(scores, is_anomaly)
    x, y = Axis("defects found (recall)", 0.0, 1.0), Axis("alarms that are right (precision)", 0.0, 1.0)
    share = float(np.mean(np.asarray(is_anomaly, dtype=bool)))
    chance = Series("chance", _path(x, y, [0.0, 1.0], [share, share]), "chance")
    # The precision of a level holds for the whole recall that the level adds.
    edges = np.concatenate([[0.0], np.repeat(recall, 2)[:-1]])
    curve = Series("curve", _path(x, y, edges, np.repeat(precision, 2)))
    marker = None
    if threshold is not None:
        labels = np.asarray(is_anomaly, dtype=bool)
        alarm = np.asarray(scores) >= threshold
        if alarm.any():
            marker = (_x_px(x, float(alarm[labels].mean())), _y_px(y, float(labels[alarm].mean())), "threshold in use")
    description = (
        f"The share of alarms that are defects against the share of defects found; average precision "
        f"{average_precision:.3f}, chance level {share:.3f}."
    )
    return Chart("precision-recall", "Precision and recall", description, x, y, (chance, curve), marker)


def score_chart(scores: ArrayLike, is_anomaly: ArrayLike, threshold: float | None) -> Chart:
    """Histograms of the scores of normal and anomalous images, each in per cent of its kind, and the threshold."""
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(is_anomaly, dtype=bool)
    shown = values if threshold is None else np.append(values, threshold)
    low, high = float(shown.min()), float(shown.max())
    margin = 0.02 * (high - low) or 0.5
    edges = np.linspace(low - margin, high + margin, _HISTOGRAM_BINS + 1)
    shares = {
        kind: np.histogram(values[labels == kind], edges)[0] / max((labels == kind).sum(), 1) for kind in (False, True)
    }
    x = Axis("score of the image", float(edges[0]), float(edges[-1]))
    y = Axis("share of its kind, %", 0.0, 105.0 * max(float(share.max()) for share in shares.values()))
    series = [
        Series(
            name,
            _path(x, y, np.repeat(edges, 2), np.concatenate([[0.0], np.repeat(100.0 * shares[kind], 2), [0.0]])),
            name,
        )
        for kind, name in ((False, "normal"), (True, "anomalous"))
    ]
    if threshold is not None:
        series.append(Series("threshold", _path(x, y, [threshold] * 2, [y.low, y.high]), f"threshold {threshold:.4g}"))
    description = (
        f"Scores of {np.count_nonzero(~labels):,} normal images, median {_median(values[~labels])}, and of "
        f"{np.count_nonzero(labels):,} anomalous images, median {_median(values[labels])}."
    )
    return Chart("scores", "Scores of the test images", description, x, y, tuple(series))


def faithfulness_chart(curves: ScoreCurves) -> Chart:
    """Deletion and insertion curves, each with its random baseline."""
    x, y = Axis("share of the cells replaced", 0.0, 1.0), Axis("score, own image = 1", 0.0, 1.0)
    series = tuple(
        Series(kind, _path(x, y, curves.shares, values), label)
        for kind, label, values in (
            ("deletion random", "deletion, random order", curves.deletion_random),
            ("insertion random", "insertion, random order", curves.insertion_random),
            ("deletion", "deletion, highest cells first", curves.deletion),
            ("insertion", "insertion, highest cells first", curves.insertion),
        )
    )
    description = (
        f"Mean score of {curves.images:,} defects that alarm while their cells are replaced by a normal image "
        f"(deletion), and of that image while it gets their cells (insertion). Area of deletion "
        f"{curves.area(curves.deletion):.3f}, in random order {curves.area(curves.deletion_random):.3f}; of insertion "
        f"{curves.area(curves.insertion):.3f}, in random order {curves.area(curves.insertion_random):.3f}."
    )
    return Chart("faithfulness", "Deletion and insertion", description, x, y, series)


def latency_histogram(samples_ms: ArrayLike, p50_ms: float, p99_ms: float) -> Chart:
    """How often each latency occurred, with median and 99th percentile."""
    values = np.asarray(samples_ms, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    margin = 0.02 * (high - low) or 0.05 * high
    edges = np.linspace(max(0.0, low - margin), high + margin, _HISTOGRAM_BINS + 1)
    share = 100.0 * np.histogram(values, edges)[0] / len(values)
    x = Axis("file to decision, ms", float(edges[0]), float(edges[-1]))
    y = Axis("share of the frames, %", 0.0, 1.05 * float(share.max()))
    bars = Series("normal", _path(x, y, np.repeat(edges, 2), np.concatenate([[0.0], np.repeat(share, 2), [0.0]])))
    lines = (
        Series("threshold", _path(x, y, [p99_ms] * 2, [y.low, y.high]), f"p99 {p99_ms:.4g} ms"),
        Series("curve", _path(x, y, [p50_ms] * 2, [y.low, y.high]), f"p50 {p50_ms:.4g} ms"),
    )
    description = f"{len(values):,} frames took {low:.4g} to {high:.4g} ms; half of them at most {p50_ms:.4g} ms."
    return Chart("latency-histogram", "Spread", description, x, y, (bars, *lines))


def latency_over_time(total_ms: ArrayLike, infer_ms: ArrayLike) -> Chart:
    """Medians of consecutive blocks of frames: a drift shows heat or other work on the machine."""
    total, infer = np.asarray(total_ms, dtype=np.float64), np.asarray(infer_ms, dtype=np.float64)
    places = np.arange(1, len(total) + 1)
    x, y = Axis("block of frames", 1.0, max(2.0, float(len(total)))), Axis("median, ms", 0.0, 1.1 * float(total.max()))
    series = (
        Series("curve", _path(x, y, places, total), "file to decision"),
        Series("deletion", _path(x, y, places, infer), "engine without scoring"),
    )
    description = (
        f"Median of each of {len(total)} blocks in turn, {total.min():.4g} to {total.max():.4g} ms from file to "
        f"decision, {infer.min():.4g} to {infer.max():.4g} ms of it in the engine."
    )
    return Chart("latency-time", "Over time", description, x, y, series)


def _median(values: NDArray[np.float64]) -> str:
    return f"{np.median(values):.4g}" if len(values) else "unknown"


def _rates_at(scores: ArrayLike, is_anomaly: ArrayLike, threshold: float) -> tuple[float, float]:
    alarm, labels = np.asarray(scores) >= threshold, np.asarray(is_anomaly, dtype=bool)
    return float(alarm[~labels].mean()), float(alarm[labels].mean())


def _x_px(axis: Axis, value: float) -> float:
    return LEFT + (value - axis.low) / (axis.high - axis.low) * (RIGHT - LEFT)


def _y_px(axis: Axis, value: float) -> float:
    return BOTTOM - (value - axis.low) / (axis.high - axis.low) * (BOTTOM - TOP)


def _path(x: Axis, y: Axis, xs: ArrayLike, ys: ArrayLike) -> str:
    points = zip(np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64), strict=True)
    return "M" + "L".join(f"{_x_px(x, float(px)):.1f} {_y_px(y, float(py)):.1f}" for px, py in points)
