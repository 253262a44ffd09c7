from __future__ import annotations

import json
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from meliad_edge.calibrate import calibrate, from_fields, outlier
from meliad_edge.errors import UsageError

SCORES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60)
RATES = st.floats(0.001, 0.999)


@pytest.mark.parametrize(("count", "rate"), [(19, 0.1), (40, 0.05), (99, 0.01), (7, 0.4)])
def test_new_normals_alarm_no_more_often_than_asked(count: int, rate: float) -> None:
    """Exchangeable scores of no special distribution; the rate is over draws of the calibration set, too."""
    random = np.random.default_rng(count)
    draws = 3000
    alarms = 0
    for _ in range(draws):
        scores = random.exponential(size=count + 1) ** 2
        alarms += scores[-1] >= calibrate(scores[:-1], target_false_alarm_rate=rate).threshold
    assert alarms / draws <= rate + 4.0 * np.sqrt(rate * (1.0 - rate) / draws)


@pytest.mark.parametrize("count", [10, 19, 99, 283])
def test_a_defect_among_the_normals_stands_out_and_sound_scores_do_not(count: int) -> None:
    random = np.random.default_rng(count)
    samples = [random.normal(-2.0, 1.0, count) for _ in range(1000)]
    assert sum(outlier(scores) is not None for scores in samples) <= 40
    for scores in samples:
        scores[count // 2] = 7.0
    assert sum(outlier(scores) == count // 2 for scores in samples) >= 900
    assert outlier([0.0] * 8 + [9.0]) is None


@pytest.mark.parametrize("per_cent", range(1, 100))
@pytest.mark.parametrize("count", [1, 9, 19, 99, 199, 250])
def test_the_rank_is_the_smallest_that_keeps_the_rate(count: int, per_cent: int) -> None:
    rate = Fraction(per_cent, 100)
    kept = [k for k in range(1, count + 1) if Fraction(count + 1 - k, count + 1) <= rate]
    rank = kept[0] if kept else count
    calibration = calibrate(np.arange(1.0, count + 1.0), target_false_alarm_rate=per_cent / 100)
    assert sum(score >= calibration.threshold for score in calibration.scores) == count - rank
    assert calibration.guaranteed_false_alarm_rate == pytest.approx((count + 1 - rank) / (count + 1))


def test_too_few_images_promise_less_than_asked() -> None:
    calibration = calibrate(np.arange(10.0), target_false_alarm_rate=0.01)
    assert calibration.guaranteed_false_alarm_rate == pytest.approx(1 / 11)
    assert calibration.threshold > 9.0


@given(SCORES, RATES)
def test_the_threshold_touches_no_score_and_separates_them_by_rank(scores: list[float], rate: float) -> None:
    calibration = calibrate(scores, target_false_alarm_rate=rate)
    below = [score for score in calibration.scores if score < calibration.threshold]
    above = [score for score in calibration.scores if score >= calibration.threshold]
    assert below
    assert len(above) <= rate * (len(scores) + 1) + 1e-6
    assert calibration.threshold > below[-1]
    # Engines compute in float32; the last normal score stays normal in it.
    assert np.float32(below[-1]) < calibration.threshold
    if above and above[0] - below[-1] > 1e-3 * max(1.0, abs(above[0])):
        assert calibration.threshold < above[0]


def test_an_engine_that_rounds_otherwise_decides_alike() -> None:
    """The last normal image keeps its decision when its score moves by what the parity check lets pass."""
    from meliad_edge.precision import DEFAULT_LIMITS

    scores = np.random.default_rng(3).gamma(4.0, size=50)
    calibration = calibrate(scores, target_false_alarm_rate=0.01)
    unit = calibration.threshold - float(np.median(scores))
    assert scores.max() + DEFAULT_LIMITS["fp32"].score * unit < calibration.threshold


@given(st.integers(1, 400), st.floats(0.001, 0.999))
def test_the_upper_bound_is_that_of_clopper_and_pearson(count: int, rate: float) -> None:
    calibration = calibrate(np.arange(float(count)), target_false_alarm_rate=rate)
    alarms = sum(score >= calibration.threshold for score in calibration.scores)
    expected = 1.0 if alarms == count else beta.ppf(0.95, alarms + 1, count - alarms)
    assert calibration.upper_bound == pytest.approx(expected, abs=1e-9)


def test_equal_scores() -> None:
    calibration = calibrate([2.0] * 30, target_false_alarm_rate=0.2)
    assert all(score < calibration.threshold for score in calibration.scores)
    assert calibration.threshold == pytest.approx(2.0, abs=1e-5)
    low, high = calibration.colour_range
    assert low < high


@given(SCORES, RATES, st.floats(-10.0, 10.0))
def test_order_does_not_matter_and_json_keeps_everything(scores: list[float], rate: float, offset: float) -> None:
    calibration = calibrate(scores, target_false_alarm_rate=rate, score_offset=offset)
    assert calibrate(scores[::-1], target_false_alarm_rate=rate, score_offset=offset) == calibration
    assert list(calibration.scores) == sorted(scores)
    assert from_fields(json.loads(json.dumps(asdict(calibration)))) == calibration


def test_the_offset_moves_the_scale_of_the_map_only() -> None:
    plain, moved = calibrate([1.0, 2.0, 4.0]), calibrate([1.0, 2.0, 4.0], score_offset=0.5)
    assert moved.threshold == plain.threshold
    assert moved.cell_threshold == pytest.approx(plain.cell_threshold - 0.5)
    low, high = moved.colour_range
    assert (moved.cell_threshold - low) / (high - low) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("scores", "rate", "says"),
    [
        ([], 0.01, "got none"),
        ([1.0, float("nan")], 0.01, "1 of 2 scores are not finite"),
        ([float("inf")], 0.01, "1 of 1"),
        ([1.0], 0.0, "between 0 and 1"),
        ([1.0], 1.0, "between 0 and 1"),
        ([1.0], float("nan"), "between 0 and 1"),
    ],
)
def test_refuses(scores: list[float], rate: float, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        calibrate(scores, target_false_alarm_rate=rate)
    assert "\n" not in str(caught.value)
