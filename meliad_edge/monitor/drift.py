"""Whether normal scores are still those of the calibration, by a test that may be read at any time.

A conformal test martingale (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2nd ed., 2022, ch. 8).
Each score gets a p-value: its rank among the calibration scores and those seen since. As long as all of them are
exchangeable, these p-values are independent and uniform however few calibration scores there are, and whoever bets
against that plays a fair game. By Ville's inequality the capital of one game ever grows a thousandfold with
probability at most 1/1,000. The bets are ours: on a normal score moved by some standard deviations, changed in the
manner of the simple jumper (Vovk et al., Retrain or not retrain, 2021), so that a change is noticed whenever it comes.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

import numpy as np
from numpy.typing import NDArray

from meliad_edge.calibrate import SMALLEST_SPREAD
from meliad_edge.monitor.glance import glance, shows_the_same, tiles
from meliad_edge.runtime.predictor import Prediction
from meliad_edge.stream.frames import Frame

# Shifts that are bet on, in standard deviations; 0 keeps the money, and gets half of it at first.
_SHIFTS = np.array([0.0, 0.5, 1.0, 2.0, -0.5, -1.0, -2.0])
_PRIOR = np.array([0.5] + 6 * [0.5 / 6])
_JUMP_RATES = np.array([0.001, 0.01])
_SMALLEST_P = 1e-9
# Fewer scores have no spread to speak of.
_FEWEST_SCORES = 10
# A threshold so close above a calibration score, in standard deviations, was made from it: `calibrate` leaves between
# them a fiftieth of the distance from the typical score.
_MADE_FROM = 0.25
_SD_PER_MAD = 1.4826
_SD_PER_DISTANCE = 0.5  # A threshold lies some two standard deviations above the typical score.


@dataclass(frozen=True, slots=True)
class DriftLimits:
    """When scores have drifted.

    Attributes:
        sample_every_s: From one score that counts to the next: frames that follow each other show the same part.
        alarm_at: Capital at which drift is reported; the chance that it gets there by luck within one window is at most
            one over it.
        window_samples: After so many scores betting starts again, with a capital of 1 and the calibration alone.
        smallest_shift: Median shift that matters, in standard deviations of the calibration scores.
        gone_shift: Median shift below which drift ends.
        latest_samples: Scores of which that median is taken.
    """

    sample_every_s: float = 5.0
    alarm_at: float = 1000.0
    window_samples: int = 1000
    smallest_shift: float = 0.5
    gone_shift: float = 0.25
    latest_samples: int = 30


class ConformalMartingale:
    """Capital of a player who bets that scores to come are not exchangeable with those of a reference.

    Args:
        reference: Scores, [n].
        rng: Breaks ties, and makes p-values of ranks uniform.
    """

    def __init__(self, reference: Sequence[float], rng: random.Random) -> None:
        self._bag = sorted(reference)
        self._rng = rng
        # By jump rate and shift.
        self._capital: NDArray[np.float64] = np.tile(_PRIOR, (len(_JUMP_RATES), 1)) / len(_JUMP_RATES)

    @property
    def capital(self) -> float:
        """What 1 has become."""
        return float(self._capital.sum())

    def update(self, score: float) -> float:
        """Take in a score; returns its p-value, small where it is high."""
        below, up_to = bisect_left(self._bag, score), bisect_right(self._bag, score)
        higher, equal = len(self._bag) - up_to, up_to - below
        p = (higher + self._rng.random() * (equal + 1)) / (len(self._bag) + 1)
        insort(self._bag, score)
        z = -NormalDist().inv_cdf(min(max(p, _SMALLEST_P), 1.0 - _SMALLEST_P))
        self._capital *= np.exp(_SHIFTS * z - 0.5 * _SHIFTS**2)
        jumping = _JUMP_RATES[:, None] * self._capital.sum(axis=1, keepdims=True)
        self._capital += jumping * _PRIOR - _JUMP_RATES[:, None] * self._capital
        return p


class DriftMonitor:
    """Reports normal scores that are ``higher`` or ``lower`` than at calibration, and by how much.

    A score counts when some seconds have passed since the last one that did, when the picture shows something else
    than then, so that a belt that stands still is not taken for many parts, and when it lies below the threshold. The
    calibration scores are cut off at the same place, so that exchangeable scores stay so. A threshold that lies just
    above a calibration score was made from it; then both are cut off at that score, and it is left out: given where it
    lies, scores below it are exchangeable, but it is not one of them. A change of the threshold starts the bets anew.

    Drift begins when the capital reaches its limit while the median of the latest scores has moved by as much as
    matters. It ends when that median is back, and betting starts again. With fewer than ten scores below the cut
    nothing is ever reported, nor when all parts became anomalies: that is for the events to tell.

    Args:
        calibration: Raw scores of normal images, as in :class:`~meliad_edge.calibrate.Calibration`.
        limits: When scores have drifted.
        rng: Breaks ties.
    """

    def __init__(
        self, calibration: Sequence[float], limits: DriftLimits | None = None, *, rng: random.Random | None = None
    ) -> None:
        self._calibration = sorted(calibration)
        self._limits = limits or DriftLimits()
        self._rng = rng or random.Random()
        self._threshold = math.nan
        self._due_s = -math.inf
        self._shown: NDArray[np.float32] | None = None
        self._bets: _Bets | None = None
        self._reported = "", ""

    def update(self, frame: Frame, prediction: Prediction) -> tuple[str, str]:
        """Take in a decision; returns the condition in one word, ``""`` when all is well, and in one sentence."""
        if prediction.threshold != self._threshold:
            self._threshold = prediction.threshold
            self._restart()
        bets = self._bets
        if bets is None or not prediction.score < bets.cut or frame.captured_s < self._due_s:
            return self._reported
        shown = tiles(glance(frame.image))
        if self._shown is not None and shows_the_same(shown, self._shown):
            return self._reported
        self._shown, self._due_s = shown, frame.captured_s + self._limits.sample_every_s
        if self._reported[0]:
            bets.latest.append(prediction.score)  # Decides when it is over; the bets are won and would grow for ever.
        else:
            bets.update(prediction.score)
        self._judge(bets)
        return self._reported

    def _judge(self, bets: _Bets) -> None:
        limits, shift = self._limits, bets.shift
        is_full = len(bets.latest) == limits.latest_samples
        if self._reported[0]:
            if is_full and abs(shift) < limits.gone_shift:
                self._restart()
        elif bets.capital >= limits.alarm_at and abs(shift) >= limits.smallest_shift:
            word = "higher" if shift > 0.0 else "lower"
            self._reported = (
                word,
                f"normal scores are {word} than at calibration, their median by {abs(shift):.1f} standard deviations "
                f"(martingale {bets.capital:,.0f} after {bets.samples} samples, alarm at {limits.alarm_at:,.0f}): "
                "look at light, lens and parts, or set the threshold anew",
            )
        elif bets.samples >= limits.window_samples:
            self._restart()

    def _restart(self) -> None:
        """Bet anew, against what the calibration says below the threshold."""
        self._reported = "", ""
        self._bets = None
        cut, reference = self._threshold, [score for score in self._calibration if score < self._threshold]
        if len(reference) > _FEWEST_SCORES and cut - reference[-1] <= _MADE_FROM * _deviation(reference):
            cut = reference[-1]
            reference = [score for score in reference if score < cut]
        if len(reference) >= _FEWEST_SCORES:
            self._bets = _Bets(reference, cut, self._limits.latest_samples, self._rng)


class _Bets:
    """One game.

    Args:
        reference: Calibration scores below the cut, sorted.
        cut: Scores at or above it do not count.
        latest_samples: Scores of which the shift is taken.
        rng: Breaks ties.
    """

    def __init__(self, reference: Sequence[float], cut: float, latest_samples: int, rng: random.Random) -> None:
        self.cut = cut
        self.latest: deque[float] = deque(maxlen=latest_samples)
        self.samples = 0
        self.capital = 1.0
        self._martingale = ConformalMartingale(reference, rng)
        self._median, self._deviation = median(reference), _deviation(reference)

    @property
    def shift(self) -> float:
        """From the median of the reference to that of the latest scores, in standard deviations of the reference."""
        return (median(self.latest) - self._median) / self._deviation

    def update(self, score: float) -> None:
        """Bet on one more score."""
        self._martingale.update(score)
        self.capital = self._martingale.capital
        self.latest.append(score)
        self.samples += 1


def _deviation(scores: Sequence[float]) -> float:
    """Standard deviation by that of most of them; never so small that rounding would matter."""
    middle = median(scores)
    smallest = _SD_PER_DISTANCE * SMALLEST_SPREAD * max(1.0, abs(middle))
    return max(_SD_PER_MAD * median(abs(score - middle) for score in scores), smallest)
