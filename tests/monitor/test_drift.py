from __future__ import annotations

import math
import pickle
import random
import re
from collections.abc import Sequence
from itertools import count
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meliad_edge.calibrate import calibrate
from meliad_edge.monitor import drift
from meliad_edge.monitor.drift import ConformalMartingale, DriftLimits, DriftMonitor
from meliad_edge.runtime.predictor import Prediction, StageTimes
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.watcher import DriftMonitor as DriftMonitorProtocol

STEP_S = 5.0
# Each shows something else than those before.
PICTURES = [np.full((64, 64, 3), 20 + 61 * number % 211, np.uint8) for number in range(211)]
EMPTY_MAP = np.zeros((1, 1), np.float32)


class Line:
    """Gives scores to a monitor."""

    def __init__(self, calibration: Sequence[float], *, seed: int = 0, limits: DriftLimits | None = None) -> None:
        self.monitor: DriftMonitorProtocol = DriftMonitor(calibration, limits, rng=random.Random(seed))
        self.threshold = calibrate(calibration).threshold
        self.now_s = 50.0
        self.detail = ""
        self._ids = count()

    def score(self, scores: Sequence[float], *, step_s: float = STEP_S, still: bool = False) -> list[str]:
        """The words that are said."""
        words = []
        for score in scores:
            number = next(self._ids)
            frame = Frame("belt", number, self.now_s, PICTURES[0 if still else number % 211], 0.0, 0.0)
            prediction = Prediction(float(score), self.threshold, EMPTY_MAP, (), StageTimes(0.0, 0.0, 0.0))
            word, self.detail = self.monitor.update(frame, prediction)
            words.append(word)
            self.now_s += step_s
        return words


def normal(count: int, seed: int, shift: float = 0.0) -> list[float]:
    return (np.random.default_rng(seed).normal(size=count) + shift).tolist()


def direct_capital(
    reference: Sequence[float], scores: Sequence[float], rng: random.Random
) -> tuple[float, list[float]]:
    """Ranks counted, capital moved from bet to bet one by one."""
    seen = list(reference)
    games = [{shift: (0.5 if shift == 0 else 0.5 / 6) / 2 for shift in (0, 0.5, 1, 2, -0.5, -1, -2)} for _ in range(2)]
    p_values = []
    for score in scores:
        higher = sum(other > score for other in seen)
        equal = sum(other == score for other in seen) + 1
        p = (higher + rng.random() * equal) / (len(seen) + 1)
        p_values.append(p)
        seen.append(score)
        z = NormalDist().inv_cdf(1 - p)
        for rate, game in zip((0.001, 0.01), games, strict=True):
            for shift in game:
                # Density of a normal score moved by the shift, over that of one that was not.
                game[shift] *= NormalDist(shift, 1).pdf(z) / NormalDist(0, 1).pdf(z)
            total = sum(game.values())
            for shift in game:
                game[shift] += rate * (total * (0.5 if shift == 0 else 0.5 / 6) - game[shift])
    return sum(sum(game.values()) for game in games), p_values


@settings(deadline=None)
@given(
    reference=st.lists(st.integers(-8, 8), min_size=1, max_size=30),
    scores=st.lists(st.integers(-8, 12), min_size=1, max_size=40),
    seed=st.integers(0, 100),
)
def test_the_capital_is_what_a_direct_computation_gives(reference: list[int], scores: list[int], seed: int) -> None:
    martingale = ConformalMartingale([float(score) for score in reference], random.Random(seed))
    p_values = [martingale.update(float(score)) for score in scores]
    capital, direct_p_values = direct_capital(reference, scores, random.Random(seed))
    assert p_values == pytest.approx(direct_p_values)
    assert martingale.capital == pytest.approx(capital, rel=1e-6)


def test_every_bet_is_fair() -> None:
    # What one unit becomes in the mean over uniform p-values, whose z is normal.
    z = np.linspace(-12.0, 12.0, 24_001)
    for shift in drift._SHIFTS:
        mean = np.sum(np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * np.exp(shift * z - 0.5 * shift**2)) * (z[1] - z[0])
        assert mean == pytest.approx(1.0)
    assert drift._PRIOR.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize("decimals", [0, 15], ids=["ties", "no ties"])
def test_p_values_are_uniform_whatever_the_size_of_the_reference(size: int, decimals: int) -> None:
    p_values: list[float] = []
    for seed in range(60):
        scores = np.round(np.random.default_rng(seed).gamma(2.0, size=size + 100), decimals).tolist()
        martingale = ConformalMartingale(scores[:size], random.Random(seed))
        p_values += [martingale.update(score) for score in scores[size:]]
    ordered = np.sort(p_values)
    distance = np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max()
    assert distance < 1.63 / math.sqrt(len(ordered))  # Kolmogorov's bound at 1 %.


def test_the_capital_grows_as_seldom_as_it_is_promised() -> None:
    reached, games = 0, 300
    for seed in range(games):
        scores = normal(550, seed)
        martingale = ConformalMartingale(scores[:50], random.Random(seed))
        highest = 0.0
        for score in scores[50:]:
            martingale.update(score)
            highest = max(highest, martingale.capital)
        reached += highest >= 20.0
    # One in twenty at most, and three standard deviations of chance.
    assert reached <= 0.05 * games + 3 * math.sqrt(games * 0.05 * 0.95)
    assert reached > 0


@pytest.mark.parametrize("size", [30, 50, 200])
def test_good_parts_never_alarm_in_five_thousand_samples(size: int) -> None:
    # Five windows, each with one chance in a thousand at most.
    for seed in range(5):
        line = Line(normal(size, seed), seed=seed)
        assert set(line.score(normal(5000, 1000 + seed))) == {""}


@pytest.mark.parametrize(("shift", "word"), [(1.0, "higher"), (-1.0, "lower")])
def test_a_shift_of_one_standard_deviation_is_found(shift: float, word: str) -> None:
    delays = []
    for seed in range(20):
        line = Line(normal(50, seed), seed=seed)
        assert set(line.score(normal(200, 100 + seed))) == {""}
        words = line.score(normal(400, 200 + seed, shift))
        assert set(words) == {"", word}
        delays.append(words.index(word))
    assert np.mean(delays) < 90


def test_the_figures_are_told_and_drift_ends_when_scores_are_back() -> None:
    line = Line(normal(200, 0))
    line.score(normal(100, 1))
    words = line.score(normal(60, 2, 1.5))
    assert words[-1] == "higher"
    figures = re.search(r"by ([\d.]+) standard .*martingale ([\d,]+) after (\d+) samples, alarm at 1,000", line.detail)
    assert figures is not None
    assert 0.5 <= float(figures[1]) < 2.0
    assert int(figures[2].replace(",", "")) >= 1000
    assert 100 < int(figures[3]) <= 160
    begun = words.index("higher")
    assert set(words[begun:]) == {"higher"}
    words = line.score(normal(200, 3))
    assert words[0] == "higher"
    assert set(words[100:]) == {""}
    assert "higher" in line.score(normal(80, 4, 1.5))


def test_a_shift_too_small_to_matter_is_not_reported_however_sure_it_is() -> None:
    for smallest_shift, words in ((0.5, {"", "higher"}), (2.5, {""})):
        line = Line(normal(200, 0), limits=DriftLimits(smallest_shift=smallest_shift))
        line.score(normal(50, 1))
        assert set(line.score(normal(500, 2, 1.0))) == words


def test_anomalies_do_not_count() -> None:
    reference = normal(100, 0)
    for threshold, score in ((calibrate(reference).threshold, 10.0), (1.0, 1.9)):
        line = Line(reference)
        line.threshold = threshold
        scores = [score] * 500
        scores[::5] = normal(100, 1)
        assert set(line.score(scores)) == {""}


def test_scores_that_rose_to_just_below_a_high_threshold_are_drift() -> None:
    line = Line(normal(100, 0))
    line.threshold = 10.0
    assert set(line.score(normal(200, 1))) == {""}
    assert "higher" in line.score(normal(50, 2, 6.0))


def test_the_score_that_a_threshold_was_made_from_is_no_sample() -> None:
    line = Line(normal(50, 0))
    # The scores between it and the threshold are not compared with those below it.
    between = (max(score for score in normal(50, 0) if score < line.threshold) + line.threshold) / 2
    assert set(line.score([between] * 300)) == {""}


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_threshold_far_inside_the_normal_scores_is_no_drift(share: float) -> None:
    """What it cuts off is cut off from the calibration, too."""
    for seed in range(5):
        reference = normal(100, seed)
        line = Line(reference, seed=seed)
        line.threshold = float(np.quantile(reference, share))
        assert set(line.score(normal(3000, 50 + seed))) == {""}


def test_a_threshold_that_is_moved_starts_the_bets_anew() -> None:
    reference = normal(200, 0)
    line = Line(reference)
    line.score(normal(300, 1))
    for threshold in (0.5, 1.5, 5.0, 0.0, 3.0):
        line.threshold = threshold
        assert set(line.score(normal(300, int(10 * threshold) + 2))) == {""}
    assert "higher" in line.score(normal(100, 99, 1.5))
    line.threshold = 2.5
    assert line.score([0.0]) == [""]


def test_frames_in_quick_succession_count_once() -> None:
    line = Line(normal(100, 0))
    # Each of these parts is seen 50 times.
    assert set(line.score(np.repeat(normal(60, 1), 50).tolist(), step_s=0.1)) == {""}
    slow, quick = Line(normal(100, 0)), Line(normal(100, 0))
    shifted = normal(60, 2, 2.0)
    words = slow.score(shifted)
    assert "higher" in words
    repeated = quick.score(np.repeat(shifted, 5).tolist(), step_s=1.0)
    assert repeated[::5] == words


def test_a_belt_that_stands_still_is_one_sample() -> None:
    line = Line(normal(100, 0))
    line.score(normal(50, 1))
    assert set(line.score([1.2] * 5000, still=True)) == {""}
    # The same scores of parts that come and go are another matter.
    assert "higher" in line.score([1.2] * 200)


@pytest.mark.parametrize(
    "calibration",
    [[], [1.0], normal(9, 0)],
    ids=["none", "one", "nine"],
)
def test_too_little_calibration_is_no_drift(calibration: list[float]) -> None:
    monitor = DriftMonitor(calibration, rng=random.Random(0))
    for number, score in enumerate(normal(300, 1, 5.0)):
        frame = Frame("belt", number, STEP_S * number, PICTURES[number % 211], 0.0, 0.0)
        prediction = Prediction(score, 1e9, EMPTY_MAP, (), StageTimes(0.0, 0.0, 0.0))
        assert monitor.update(frame, prediction) == ("", "")


def test_calibration_scores_that_are_all_alike_have_no_score_below_them() -> None:
    line = Line([1.0] * 50)
    assert set(line.score([1.0] * 500)) == {""}


def test_scores_that_are_no_numbers_do_not_count() -> None:
    line = Line(normal(100, 0))
    assert set(line.score([math.nan, math.inf] * 5 + normal(200, 1))) == {""}


def test_scores_with_few_values_have_ties_that_are_broken() -> None:
    rounded: NDArray[np.float64] = np.round(np.random.default_rng(0).normal(size=3100), 0)
    line = Line(rounded[:100].tolist())
    assert set(line.score(rounded[100:].tolist())) == {""}


def test_memory_does_not_grow() -> None:
    limits = DriftLimits(window_samples=100)
    line = Line(normal(50, 0), limits=limits)
    line.score(normal(99, 1))
    size = len(pickle.dumps(line.monitor))
    line.score(normal(3000, 2))
    assert len(pickle.dumps(line.monitor)) <= size + 200


def test_memory_does_not_grow_while_drift_is_reported() -> None:
    line = Line(normal(50, 0))
    assert line.score(normal(200, 1, 1.5))[-1] == "higher"
    size = len(pickle.dumps(line.monitor))
    assert set(line.score(normal(3000, 2, 1.5))) == {"higher"}
    assert len(pickle.dumps(line.monitor)) <= size + 200
    assert line.score(normal(100, 3))[-1] == ""
