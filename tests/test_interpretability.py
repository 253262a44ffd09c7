from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meliad_edge.errors import DataError
from meliad_edge.interpretability import measure_interpretability, pointing_game, region_overlap

pytestmark = pytest.mark.workshop


def cases(seed: int, count: int = 4, grid: int = 4, cell: int = 4) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random maps, and masks of a few rectangles at the size of the image."""
    rng = np.random.default_rng(seed)
    maps = [rng.normal(size=(grid, grid)).astype(np.float32) for _ in range(count)]
    masks = []
    for _ in range(count):
        mask = np.zeros((grid * cell, grid * cell), bool)
        for _ in range(int(rng.integers(1, 3))):
            y, x = rng.integers(0, grid * cell - 2, 2)
            mask[y : y + int(rng.integers(1, 6)), x : x + int(rng.integers(1, 6))] = True
        masks.append(mask)
    return maps, masks


def bilinear(evidence: np.ndarray, side: int) -> np.ndarray:
    """Slow: every pixel from its four nearest cells, those outside the grid being those at its border."""
    grid = len(evidence)
    result = np.zeros((side, side))
    for y in range(side):
        for x in range(side):
            row, column = (y + 0.5) * grid / side - 0.5, (x + 0.5) * grid / side - 0.5
            for i in (int(np.floor(row)), int(np.floor(row)) + 1):
                for j in (int(np.floor(column)), int(np.floor(column)) + 1):
                    weight = (1 - abs(row - i)) * (1 - abs(column - j))
                    result[y, x] += weight * float(evidence[np.clip(i, 0, grid - 1), np.clip(j, 0, grid - 1)])
    return result


def slow_pointing(evidence: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Share of the highest pixels with a mask pixel no farther than half a cell, and that of all pixels."""
    side, reach = len(mask), len(mask) // len(evidence) // 2
    enlarged = bilinear(evidence, side)
    near = np.zeros_like(mask)
    for y in range(side):
        for x in range(side):
            near[y, x] = any(
                mask[i, j]
                for i in range(max(0, y - reach), min(side, y + reach + 1))
                for j in range(max(0, x - reach), min(side, x + reach + 1))
            )
    highest = [
        bool(near[y, x]) for y in range(side) for x in range(side) if np.isclose(enlarged[y, x], enlarged.max(), 1e-6)
    ]
    return sum(highest) / len(highest), float(near.mean())


def slow_iou(evidence: np.ndarray, mask: np.ndarray, threshold: float) -> float:
    side, grid = len(mask), len(evidence)
    both = either = 0
    for y in range(side):
        for x in range(side):
            marked = evidence[y * grid // side, x * grid // side] >= threshold
            both += bool(marked and mask[y, x])
            either += bool(marked or mask[y, x])
    return both / either


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_pointing_is_that_of_the_slow_definition(seed: int) -> None:
    maps, masks = cases(seed)
    slow = np.array([slow_pointing(*case) for case in zip(maps, masks, strict=True)])
    result = pointing_game(maps, masks)
    assert result.accuracy == pytest.approx(slow[:, 0].mean(), abs=1e-9)
    assert result.chance == pytest.approx(slow[:, 1].mean(), abs=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1, 2))
def test_overlap_is_that_of_the_slow_definition(seed: int, threshold: float) -> None:
    maps, masks = cases(seed)
    every = [*np.unique(maps).tolist(), threshold]
    means = [np.mean([slow_iou(*case, value) for case in zip(maps, masks, strict=True)]) for value in every]
    result = region_overlap(maps, masks, threshold)
    assert result.iou == pytest.approx(means[-1], abs=1e-12)
    assert result.iou_best == pytest.approx(max(means), abs=1e-12)
    at_best = [slow_iou(*case, result.best_threshold) for case in zip(maps, masks, strict=True)]
    assert np.mean(at_best) == pytest.approx(max(means), abs=1e-12)
    assert result.touched == np.mean([slow_iou(*case, threshold) > 0 for case in zip(maps, masks, strict=True)])


def test_a_perfect_map_gets_one_and_its_inverse_nothing() -> None:
    rng = np.random.default_rng(1)
    maps = [(rng.random((8, 8)) < 0.2).astype(np.float32) for _ in range(5)]
    for evidence in maps:
        evidence[3, 4] = 1.0
    masks = [np.kron(evidence, np.ones((8, 8))) > 0 for evidence in maps]
    pointing, overlap = pointing_game(maps, masks), region_overlap(maps, masks, 0.5)
    assert (pointing.accuracy, pointing.accuracy_ci) == (1.0, (1.0, 1.0))
    assert (overlap.iou, overlap.iou_best, overlap.touched) == (1.0, 1.0, 1.0)
    assert (overlap.iou_ci, overlap.iou_best_ci) == ((1.0, 1.0), (1.0, 1.0))
    inverse = region_overlap([1.0 - evidence for evidence in maps], masks, 0.5)
    assert (inverse.iou, inverse.touched) == (0.0, 0.0)
    # The best that can be done is to mark everything.
    assert inverse.iou_best == pytest.approx(np.mean([mask.mean() for mask in masks]))


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_a_constant_map_gets_chance(value: float) -> None:
    _, masks = cases(2, grid=5, cell=7)
    pointing = pointing_game([np.full((5, 5), value, np.float32)] * len(masks), masks)
    assert pointing.accuracy == pytest.approx(pointing.chance, abs=1e-12)
    assert 0.0 < pointing.chance < 1.0


def test_a_cell_that_touches_the_defect_points_at_it() -> None:
    evidence = np.zeros((4, 4), np.float32)
    evidence[1, 2] = 1.0
    corner, beyond = np.zeros((32, 32), bool), np.zeros((32, 32), bool)
    corner[8, 16] = True  # The first pixel of the cell, 4 pixels from its middle.
    beyond[8, 15 - 4] = True
    assert pointing_game([evidence], [corner]).accuracy == 1.0
    assert pointing_game([evidence], [beyond]).accuracy == 0.0


def test_intervals_are_those_of_the_mean() -> None:
    rng = np.random.default_rng(3)
    maps, masks = cases(3, count=200)
    hits = rng.random(200) < 0.7
    masks = [np.full((16, 16), hit) for hit in hits]
    for mask in masks:
        mask[0, 0] = True  # A mask is never empty.
    maps = [np.eye(4, dtype=np.float32)[::-1] for _ in hits]  # Highest far from that corner.
    pointing = pointing_game(maps, masks)
    assert pointing.accuracy == pytest.approx(hits.mean())
    error = np.sqrt(hits.mean() * (1 - hits.mean()) / 200)
    assert pointing.accuracy_ci == pytest.approx((hits.mean() - 1.96 * error, hits.mean() + 1.96 * error), abs=0.015)


def test_many_values_are_thinned_without_harm() -> None:
    rng = np.random.default_rng(4)
    masks = [np.zeros((64, 64), bool) for _ in range(3)]
    for mask in masks:
        mask[20:44, 10:50] = True
    maps = [rng.normal(size=(64, 64)).astype(np.float32) + 2.0 * mask.astype(np.float32) for mask in masks]
    every = np.unique(np.concatenate([m[mask] for m, mask in zip(maps, masks, strict=True)]))
    exact = 0.0
    for threshold in every[::4]:
        pairs = [((m >= threshold), mask) for m, mask in zip(maps, masks, strict=True)]
        exact = max(exact, float(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs])))
    assert region_overlap(maps, masks, 0.0).iou_best == pytest.approx(exact, abs=2e-3)


@pytest.fixture(scope="module")
def evaluated(small_run: Path, invoke: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """What `evaluate --interpretability` printed as JSON, and its page."""
    page = tmp_path_factory.mktemp("report") / "report.html"
    outcome = invoke("evaluate", small_run, "--interpretability", "--json", "--report", page)
    assert outcome.code == 0, outcome.err
    return outcome.json, page.read_text(encoding="utf-8")


def test_a_run_is_measured_on_request(evaluated: tuple[Any, str], small_run: Path, invoke: Any) -> None:
    result, _ = evaluated
    assert result["masked_anomalies"] == result["test_anomalies"] == 14
    for name in ("pointing_accuracy", "region_iou", "region_iou_best"):
        low, high = result[f"{name}_ci"]
        assert 0.0 <= low <= result[name] <= high <= 1.0
    assert result["pointing_accuracy"] > result["pointing_chance"]
    assert result["region_iou_best"] >= result["region_iou"]
    assert result["curve_images"] == 14 - result["misses"] > 0
    assert result["deletion_auc"] < result["deletion_auc_random"]
    assert result["insertion_auc"] > result["insertion_auc_random"]
    assert result["randomised_passed"] is True
    assert (result["randomised_images"], result["randomised_unusable_maps"]) == (14, 0)
    assert "pointing_accuracy" not in invoke("evaluate", small_run, "--json").json


def test_the_page_shows_it(evaluated: tuple[Any, str]) -> None:
    result, page = evaluated
    assert "How well the maps explain" in page
    assert f"chance {result['pointing_chance']:.3f}" in page
    assert f"random order {result['deletion_auc_random']:.3f}" in page
    assert page.count('class="deletion"') == 2  # legend and curve


def test_without_masks_or_alarms_what_is_left_is_measured(small_run: Path) -> None:
    from meliad_edge.evaluate import evaluate
    from meliad_edge.run import load_run

    run = load_run(small_run)
    evaluation = evaluate(run)
    frames, raw, truth = evaluation.images.frames, evaluation.raw, evaluation.is_anomaly
    quiet = type(raw)(np.full_like(raw.score, -1e9), raw.map, raw.nearest)
    result = measure_interpretability(run, frames, quiet, truth, {})
    absent = result.to_dict()
    assert (result.pointing, result.overlap, result.curves) == (None, None, None)
    assert absent["masked_anomalies"] == absent["curve_images"] == 0
    for name in ("pointing_accuracy", "pointing_accuracy_ci", "pointing_chance", "region_iou_best", "deletion_auc"):
        assert absent[name] is None
    assert -0.5 < absent["randomised_correlation"] < 0.5
    broken = raw.map.copy()
    broken[3, 0, 0] = np.nan
    with pytest.raises(DataError, match=r"1 of 22 maps have values that are not finite; fit the model again"):
        measure_interpretability(run, frames, type(raw)(raw.score, broken, raw.nearest), truth, evaluation.masks)
