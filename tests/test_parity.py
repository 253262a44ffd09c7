from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from meliad_edge.calibrate import Calibration
from meliad_edge.errors import ParityError
from meliad_edge.parity import ParityResult, compare, require_parity
from meliad_edge.precision import ParityLimits
from meliad_edge.runtime.engine import RawScores

# The typical normal score is 0 and the threshold 10: errors are in tenths of a unit.
LIMITS = ParityLimits(score=0.01, map=0.02)
CALIBRATION = Calibration(10.0, 0.01, 0.01, 0.05, (-1.0, 0.0, 1.0))


def raw(scores: list[float], evidence: NDArray[np.float32] | None = None) -> RawScores:
    maps = np.zeros((len(scores), 2, 2), np.float32) if evidence is None else evidence
    return RawScores(np.array(scores, np.float32), maps, np.zeros((len(scores), 2, 2, 2), np.int64))


def of(reference: RawScores, result: RawScores) -> ParityResult:
    names = [f"{index}.png" for index in range(len(reference.score))]
    return compare("engine", "fp32", reference, result, CALIBRATION, LIMITS, names)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_the_same_results_pass(scores: list[float]) -> None:
    result = of(raw(scores), raw(scores))
    assert result.passed
    assert (result.score_error, result.map_error, result.rank_swaps, result.label_flips) == (0.0, 0.0, 0, ())
    require_parity([result])


def test_errors_are_fractions_of_the_way_from_normal_to_the_threshold() -> None:
    result = of(raw([5.0, 20.0]), raw([5.05, 19.98]))
    assert result.score_error == pytest.approx(0.005, rel=1e-3)
    assert result.passed


@pytest.mark.parametrize(("difference", "passed"), [(0.9 * LIMITS.score, True), (1.1 * LIMITS.score, False)])
def test_the_limit_of_scores(difference: float, passed: bool) -> None:
    assert of(raw([5.0]), raw([5.0 + 10.0 * difference])).passed is passed


@pytest.mark.parametrize(("difference", "passed"), [(0.9 * LIMITS.map, True), (1.1 * LIMITS.map, False)])
def test_the_limit_of_maps(difference: float, passed: bool) -> None:
    evidence = np.zeros((1, 2, 2), np.float32)
    evidence[0, 1, 0] = 10.0 * difference
    assert of(raw([5.0]), raw([5.0], evidence)).passed is passed


@pytest.mark.parametrize(("before", "after"), [(9.999, 10.001), (10.0, 9.9999)])
def test_a_flip_fails_however_small_the_error(before: float, after: float) -> None:
    result = of(raw([0.0, before]), raw([0.0, after]))
    assert result.score_error < LIMITS.score
    (flip,) = result.label_flips
    assert (flip.name, flip.reference, flip.score) == ("1.png", pytest.approx(before), pytest.approx(after))
    with pytest.raises(
        ParityError, match=r"1 label flips in 2 frames.*; 1\.png scores .* instead of .*, threshold 10\.0000$"
    ) as caught:
        require_parity([result])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0.0, 20.0])
def test_what_is_not_finite_fails_on_either_side_of_the_threshold(bad: float, at: float) -> None:
    for reference, result in [(raw([at]), raw([bad])), (raw([bad]), raw([at]))]:
        compared = of(reference, result)
        assert compared.score_error == np.inf
        assert [flip.name for flip in compared.label_flips] == ["0.png"]
        assert not compared.passed
    assert not of(raw([bad]), raw([bad])).passed


def test_a_map_that_is_not_finite_fails() -> None:
    evidence = np.zeros((1, 2, 2), np.float32)
    evidence[0, 0, 0] = np.nan
    result = of(raw([5.0]), raw([5.0], evidence))
    assert result.map_error == np.inf
    assert not result.passed


def test_swapped_ranks_count_only_where_the_distance_is_more_than_rounding() -> None:
    assert of(raw([1.0, 2.0, 3.0]), raw([1.0, 3.0, 2.0])).rank_swaps == 1
    assert of(raw([3.0, 2.0, 1.0]), raw([1.0, 2.0, 3.0])).rank_swaps == 3
    assert of(raw([2.0, 2.05]), raw([2.05, 2.0])).rank_swaps == 0


def test_the_first_engine_that_fails_is_named() -> None:
    good, bad = of(raw([0.0]), raw([0.0])), of(raw([0.0]), raw([5.0]))
    with pytest.raises(
        ParityError, match=r"^engine in fp32 does not decide .* score error 50\.00% \(limit 1%\), map error 0\.00% .*$"
    ):
        require_parity([good, bad])
    assert bad.to_dict()["passed"] is False
