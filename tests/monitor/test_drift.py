from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meliad_edge.monitor.drift import SAMPLE_EVERY_S, ConformalMartingale, DriftMonitor
from meliad_edge.runtime.predictor import Prediction, StageTimes
from meliad_edge.stream.frames import Frame

IMAGE, MAP = np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.float32)


def feed(
    monitor: DriftMonitor, scores: list[float], threshold: float = 1e9, *, start_s: float = 0.0, every_s: float = 5.01
) -> list[str]:
    words = []
    for index, score in enumerate(scores):
        frame = Frame("belt", index, start_s + every_s * index, IMAGE, 0.0, 0.0)
        prediction = Prediction(score, threshold, MAP, (), StageTimes(0, 0, 0))
        words.append(monitor.update(frame, prediction)[0])
    return words


def gamma(seed: int, count: int) -> list[float]:
    return np.random.default_rng(seed).gamma(4.0, 1.0, count).tolist()


def reference_capital(reference: list[float], scores: list[float], seed: int) -> tuple[list[float], float]:
    """The definition, written out: ranks by counting, every rate of the simple jumper on its own."""
    source = random.Random(seed)
    seen = list(reference)
    p_values = []
    for score in scores:
        higher = sum(other > score for other in seen)
        equal = sum(other == score for other in seen) + 1
        p_values.append((higher + source.random() * equal) / (len(seen) + 1))
        seen.append(score)
    capitals = []
    for rate in (0.001, 0.01, 0.1):
        capital = {bet: 1.0 / 3.0 for bet in (-1, 0, 1)}
        for p in p_values:
            total = sum(capital.values())
            capital = {
                bet: ((1 - rate) * amount + rate * total / 3.0) * (1.0 - bet * (p - 0.5))
                for bet, amount in capital.items()
            }
        capitals.append(sum(capital.values()))
    return p_values, sum(capitals) / 3.0


scores = st.lists(st.floats(-5, 5).map(lambda x: round(x, 1)), min_size=1, max_size=40)


@given(reference=scores, seen=scores, seed=st.integers(0, 1000))
def test_the_martingale_is_its_definition(reference: list[float], seen: list[float], seed: int) -> None:
    martingale = ConformalMartingale(reference, random.Random(seed))
    p_values = [martingale.update(score) for score in seen]
    expected_p, expected = reference_capital(reference, seen, seed)
    assert p_values == pytest.approx(expected_p)
    assert martingale.capital == pytest.approx(expected, rel=1e-9)


def test_p_values_of_exchangeable_scores_are_uniform_however_few_the_reference() -> None:
    p_values = []
    for seed in range(200):
        martingale = ConformalMartingale(gamma(seed, 10), random.Random(seed))
        p_values += [martingale.update(score) for score in gamma(seed + 1000, 20)]
    counts, _ = np.histogram(p_values, bins=10, range=(0, 1))
    assert abs(counts - 400).max() < 4.5 * math.sqrt(400)


@pytest.mark.parametrize("count", [30, 50, 200])
def test_scores_like_those_of_the_calibration_do_not_alarm_in_the_long_run(count: int) -> None:
    alarms = 0
    for seed in range(12):
        calibration = gamma(seed, count)
        words = feed(DriftMonitor(calibration, random.Random(seed)), gamma(seed + 500, 5000), max(calibration) + 0.1)
        alarms += any(words)
    assert alarms <= 1  # Ville: five windows of a thousand, at most .005 each.


@pytest.mark.parametrize(("shift", "word"), [(2.0, "higher"), (-2.0, "lower")])
def test_a_shift_of_one_standard_deviation_is_found_within_a_hundred_samples(shift: float, word: str) -> None:
    for seed in range(8):
        monitor = DriftMonitor(gamma(seed, 100), random.Random(seed))
        assert not any(feed(monitor, gamma(seed + 500, 200)))
        moved = [score + shift for score in gamma(seed + 900, 150)]
        words = feed(monitor, moved, start_s=5000.0)
        assert words[-1] == word
        assert words.index(word) <= 100


def test_it_ends_when_the_scores_are_back_and_may_begin_again() -> None:
    monitor = DriftMonitor(gamma(0, 100), random.Random(0))
    assert feed(monitor, [score + 4.0 for score in gamma(1, 100)])[-1] == "higher"
    assert feed(monitor, gamma(2, 80), start_s=5000.0)[-1] == ""
    assert feed(monitor, [score + 4.0 for score in gamma(3, 100)], start_s=9000.0)[-1] == "higher"


def test_a_shift_too_small_to_matter_is_not_reported_however_certain() -> None:
    monitor = DriftMonitor(gamma(0, 400), random.Random(0))
    assert not any(feed(monitor, [score + 0.25 for score in gamma(1, 3000)]))


def test_frames_of_one_moment_count_once() -> None:
    monitor = DriftMonitor(gamma(0, 100), random.Random(0))
    # Forty frames in a second of one odd part, again and again; the rest of each interval is left out.
    assert not any(feed(monitor, [9.0] * 1000, every_s=SAMPLE_EVERY_S / 1000))


def test_anomalies_are_no_drift_and_what_the_threshold_cuts_off_is_cut_off_on_both_sides() -> None:
    calibration = gamma(0, 200)
    threshold = float(np.quantile(calibration, 0.7))  # An odd choice: three of ten good parts alarm.
    monitor = DriftMonitor(calibration, random.Random(0))
    assert not any(feed(monitor, gamma(1, 2000), threshold))


def test_a_threshold_that_is_moved_starts_the_test_anew() -> None:
    calibration = gamma(0, 200)
    monitor = DriftMonitor(calibration, random.Random(0))
    assert feed(monitor, [score + 4.0 for score in gamma(1, 100)])[-1] == "higher"
    assert feed(monitor, [4.0], 100.0, start_s=9000.0) == [""]


def test_the_sentence_has_the_figures() -> None:
    monitor = DriftMonitor(gamma(0, 100), random.Random(0))
    feed(monitor, [score + 4.0 for score in gamma(1, 100)])
    frame = Frame("belt", 0, 9000.0, IMAGE, 0.0, 0.0)
    _, detail = monitor.update(frame, Prediction(8.0, 1e9, MAP, (), StageTimes(0, 0, 0)))
    assert "normal scores are higher than at calibration, by " in detail
    assert "alarm at 1000" in detail


def test_next_to_no_calibration_is_no_reference() -> None:
    assert not any(feed(DriftMonitor([1.0], random.Random(0)), [9.0] * 500))
