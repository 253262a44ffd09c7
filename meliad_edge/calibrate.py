"""From raw scores of held-out normal images to a threshold with a stated false-alarm rate.

The threshold lives outside the exported graph, which stays the same whatever the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meliad_edge.errors import UsageError
from meliad_edge.rates import upper_bound

DEFAULT_FALSE_ALARM_RATE = 0.01
CONFIDENCE = 0.95
# Share of the distance from the typical score that is left above the last normal one: twice what parity lets pass.
HEADROOM = 0.02
# Scores are log odds: a smaller distance, or a smaller share of a score, means nothing.
SMALLEST_SPREAD = 0.1
_FEWEST_SCORES = 10


@dataclass(frozen=True, slots=True)
class Calibration:
    """A threshold and what is known about its false alarms.

    Attributes:
        threshold: Raw score at or above which an image is an anomaly.
        target_false_alarm_rate: The rate that was asked for, in (0, 1).
        guaranteed_false_alarm_rate: Conformal bound on the expected rate with this many images:
            the chance that one more exchangeable normal image alarms. Equal to or below the target
            unless there are too few images; then it is 1 / (n + 1).
        upper_bound: One-sided 95 % Clopper-Pearson bound on the rate behind this one calibration set.
        scores: Sorted raw scores of the calibration images; they allow another threshold later.
        score_offset: Constant b0 of the model: score = mean of the top cells + ``score_offset``.
    """

    threshold: float
    target_false_alarm_rate: float
    guaranteed_false_alarm_rate: float
    upper_bound: float
    scores: tuple[float, ...]
    score_offset: float = 0.0

    @property
    def count(self) -> int:
        """Number of normal images the threshold rests on."""
        return len(self.scores)

    @property
    def cell_threshold(self) -> float:
        """Evidence at or above which one cell of the map is marked as part of a region.

        On the scale of the map it is the image threshold: an image above the threshold therefore has at least
        one marked cell wherever the score is the mean of the top cells of the map.
        """
        return self.threshold - self.score_offset

    @property
    def spread(self) -> float:
        """Distance from the typical normal score to the threshold, the unit in which rounding is judged.

        At least a tenth, and at least a tenth of the typical score, for calibrations on next to no images.
        """
        return _spread(float(np.median(self.scores)), self.threshold)

    @property
    def colour_range(self) -> tuple[float, float]:
        """Map values drawn as the first and the last colour, the same for every image of a model.

        The range starts at the typical calibration score and has the threshold one third of the way up.
        """
        low = float(np.median(self.scores)) - self.score_offset
        return low, low + 3.0 * self.spread


def calibrate(
    scores: Sequence[float] | NDArray[np.floating],
    *,
    target_false_alarm_rate: float = DEFAULT_FALSE_ALARM_RATE,
    score_offset: float = 0.0,
) -> Calibration:
    """Choose the threshold that split conformal prediction gives for a false-alarm rate.

    With n exchangeable normal scores sorted upwards, the k-th with k = ceil((n + 1)(1 - rate)) is exceeded
    by a new normal image with probability at most ``rate`` (Vovk et al., 2005). With fewer than 1/rate - 1
    images no finite threshold has that guarantee; the largest score is used and the weaker guarantee
    1 / (n + 1) is reported.

    Args:
        scores: Raw scores of normal images that the detector was not fitted on, [n].
        target_false_alarm_rate: Accepted rate of alarms on normal images, in (0, 1).
        score_offset: Constant b0 of the model, see :class:`Calibration`.

    Raises:
        UsageError: No scores, a score that is not finite, or a rate outside (0, 1).
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    count = len(ordered)
    if count == 0:
        msg = "calibration needs normal images that were not trained on; got none. Add images to train/good"
        raise UsageError(msg)
    if not np.isfinite(ordered).all():
        bad = int(np.count_nonzero(~np.isfinite(ordered)))
        msg = f"calibration: {bad} of {count} scores are not finite; fit the model again"
        raise UsageError(msg)
    if not 0.0 < target_false_alarm_rate < 1.0:
        msg = f"false-alarm rate must lie between 0 and 1, got {target_false_alarm_rate:g}; try 0.01"
        raise UsageError(msg)
    # Rounding must not cost a rank where (n + 1)(1 - rate) is a whole number.
    rank = min(math.ceil((count + 1) * (1.0 - target_false_alarm_rate) - 1e-9), count)
    threshold = _threshold_above(ordered, rank)
    return Calibration(
        threshold=threshold,
        target_false_alarm_rate=target_false_alarm_rate,
        guaranteed_false_alarm_rate=(count + 1 - rank) / (count + 1),
        upper_bound=upper_bound(int(np.count_nonzero(ordered >= threshold)), count, confidence=CONFIDENCE),
        scores=tuple(float(s) for s in ordered),
        score_offset=score_offset,
    )


def outlier(scores: Sequence[float] | NDArray[np.floating]) -> int | None:
    """Index of a highest score that stands far above all others [ours]; its image may be a defect among the normals.

    Far is three interquartile ranges above the second, as Tukey's outer fence is; fewer than 10 scores have none.

    Args:
        scores: As for :func:`calibrate`.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) < _FEWEST_SCORES:
        return None
    second, highest = np.sort(values)[-2:]
    lower, upper = np.quantile(values, (0.25, 0.75))
    return int(values.argmax()) if highest - second > 3.0 * (upper - lower) else None


def move_threshold(calibration: Calibration, threshold: float) -> Calibration:
    """The same calibration images at another threshold, with what it promises then.

    Args:
        calibration: Its scores are kept.
        threshold: Any finite score.
    """
    alarms, count = sum(score >= threshold for score in calibration.scores), calibration.count
    rate = (alarms + 1) / (count + 1)
    return replace(
        calibration,
        threshold=threshold,
        target_false_alarm_rate=rate,
        guaranteed_false_alarm_rate=rate,
        upper_bound=upper_bound(alarms, count, confidence=CONFIDENCE),
    )


def from_fields(fields: Mapping[str, Any]) -> Calibration:
    """The inverse of ``dataclasses.asdict``, for what was read from JSON.

    Raises:
        KeyError, TypeError: Fields are missing, unknown or of another type.
        ValueError: There are no scores, or a figure is not finite.
    """
    calibration = Calibration(**{**fields, "scores": tuple(fields["scores"])})
    *figures, scores, offset = astuple(calibration)
    if not scores or not all(math.isfinite(figure) for figure in (*figures, *scores, offset)):
        msg = "calibration without scores, or with a figure that is not finite"
        raise ValueError(msg)
    return calibration


def _threshold_above(ordered: NDArray[np.float64], rank: int) -> float:
    """A threshold that the scores up to this rank do not reach, with room for the rounding of other engines.

    Every value up to the next score decides alike on the calibration images. One that touches a score would turn
    the decision on that image into a matter of the last bit.
    """
    score = float(ordered[rank - 1])
    room = HEADROOM * _spread(float(np.median(ordered)), score)
    if rank < len(ordered):
        room = min(room, 0.5 * (float(ordered[rank]) - score))
    # An image alarms at or above the threshold, so it lies at least one float above the score.
    return max(score + room, float(np.nextafter(np.float32(score), np.float32(np.inf))))


def _spread(low: float, high: float) -> float:
    return max(high - low, SMALLEST_SPREAD * max(1.0, abs(low)))
