"""Whether normal scores are still those of the calibration, by a test that may be asked at any time.

A conformal test martingale (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2nd ed., 2022, ch. 8):
each score gets a p-value, its rank among the calibration scores and those seen since. While all of them are
exchangeable, the p-values are independent and uniform, and no bet on them wins in the long run: by Ville's inequality
the capital ever multiplies by 1,000 with probability at most .001. Bets are those of the simple jumper (Vovk et al.,
Retrain or not retrain, 2021), mixed over its rates.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence

import numpy as np

from meliad_edge.runtime.predictor import Prediction
from meliad_edge.stream.frames import Frame

ALARM_AT = 1000.0
# Frames that follow each other show the same part; the test needs others.
SAMPLE_EVERY_S = 5.0
# After so many samples, over an hour, the capital starts again from 1: what was seen then is no reference for ever.
WINDOW_SAMPLES = 1000
# A shift that matters, and one that no longer does, in standard deviations of the calibration scores.
SMALLEST_SHIFT, GONE_SHIFT = 0.5, 0.25
_RECENT_SAMPLES = 50
_RATES = (0.001, 0.01, 0.1)
# Standard deviation of a normal distribution over its median absolute deviation.
_SD_PER_MAD = 1.4826


class ConformalMartingale:
    """Capital of a player who bets that scores are not exchangeable with a reference.

    Args:
        reference: Scores, [n], n > 0.
        random_source: Breaks ties.
    """

    def __init__(self, reference: Sequence[float], random_source: random.Random) -> None:
        self._bag = sorted(reference)
        self._random = random_source
        # By rate: capital on low scores, on nothing, on high ones.
        self._jumpers = [[1.0 / 3.0] * 3 for _ in _RATES]

    @property
    def capital(self) -> float:
        """What 1 has become."""
        return sum(map(sum, self._jumpers)) / len(self._jumpers)

    def update(self, score: float) -> float:
        """Take in a score; returns its p-value: small where it is high."""
        below, upto = bisect_left(self._bag, score), bisect_right(self._bag, score)
        higher, equal = len(self._bag) - upto, upto - below
        p = (higher + self._random.random() * (equal + 1)) / (len(self._bag) + 1)
        insort(self._bag, score)
        for rate, capital in zip(_RATES, self._jumpers, strict=True):
            share = rate * sum(capital) / 3.0
            for index, bet in enumerate((1.0, 0.0, -1.0)):
                capital[index] = ((1.0 - rate) * capital[index] + share) * (1.0 + bet * (p - 0.5))
        return p


class DriftMonitor:
    """Reports scores that drift away from the calibration, and by how much.

    One frame every five seconds counts, and only frames that are no anomaly; what the threshold cuts off is cut off
    from the calibration, too. Drift is reported when the capital has reached 1,000 and the median of the latest 50
    samples lies half a standard deviation away; it ends when that distance is below a quarter.

    Args:
        calibration: Raw scores of normal images, as in :class:`~meliad_edge.calibrate.Calibration`.
        random_source: Breaks ties.
    """

    def __init__(self, calibration: Sequence[float], random_source: random.Random | None = None) -> None:
        self._calibration = sorted(calibration)
        self._random = random_source or random.Random()
        self._threshold: float | None = None
        self._due_s = -np.inf
        self._reported = "", ""
        self._restart()

    def update(self, frame: Frame, prediction: Prediction) -> tuple[str, str]:
        """Take in a decision; returns ``higher`` or ``lower``, ``""`` when all is well, and the figures."""
        if prediction.threshold != self._threshold:
            self._threshold = prediction.threshold
            self._reported = "", ""
            self._restart()
        if prediction.is_anomaly or frame.captured_s < self._due_s or self._martingale is None:
            return self._reported
        self._due_s = frame.captured_s + SAMPLE_EVERY_S
        self._martingale.update(prediction.score)
        self._recent.append(prediction.score)
        self._samples += 1
        self._judge(self._martingale.capital)
        return self._reported

    def _judge(self, capital: float) -> None:
        if len(self._recent) < _RECENT_SAMPLES:
            return
        shift = (float(np.median(self._recent)) - self._median) / self._deviation
        if self._reported[0]:
            if abs(shift) < GONE_SHIFT:
                self._reported = "", ""
                self._restart()
        elif capital >= ALARM_AT and abs(shift) >= SMALLEST_SHIFT:
            word = "higher" if shift > 0 else "lower"
            self._reported = (
                word,
                f"normal scores are {word} than at calibration, by {abs(shift):.1f} standard deviations "
                f"(martingale {capital:.3g} after {self._samples} samples, alarm at {ALARM_AT:g}); "
                "look at light and lens, or set the threshold anew with: meliad-edge threshold --from",
            )
        elif self._samples >= WINDOW_SAMPLES:
            self._restart()

    def _restart(self) -> None:
        """Begin to bet anew against the calibration scores below the threshold."""
        limit = np.inf if self._threshold is None else self._threshold
        reference = [score for score in self._calibration if score < limit]
        self._martingale = ConformalMartingale(reference, self._random) if len(reference) > 1 else None
        self._median = float(np.median(reference)) if reference else 0.0
        deviations = [abs(score - self._median) for score in reference]
        mad = float(np.median(deviations)) if reference else 0.0
        self._deviation = max(_SD_PER_MAD * mad, 1e-6)
        self._recent: deque[float] = deque(maxlen=_RECENT_SAMPLES)
        self._samples = 0
