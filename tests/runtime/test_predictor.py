from __future__ import annotations

import numpy as np
import pytest

from meliad_edge.calibrate import Calibration, calibrate
from meliad_edge.runtime.predictor import Region, find_regions
from meliad_edge.runtime.view import Box

NO_PROTOTYPES = np.full((2, 3, 4), -1, np.int64)


@pytest.fixture
def calibration() -> Calibration:
    """A threshold just above 2."""
    return calibrate(np.array([1.0, 1.5, 2.0]))


def _regions(evidence: np.ndarray, calibration: Calibration) -> tuple[Region, ...]:
    return find_regions(evidence, NO_PROTOTYPES, Box(0, 0, 80, 30), calibration, ())


def _boxes(regions: tuple[Region, ...]) -> list[tuple[int, int, int, int]]:
    return [(region.x, region.y, region.width, region.height) for region in regions]


def test_regions_are_the_cells_at_or_above_the_threshold_highest_first(calibration: Calibration) -> None:
    evidence = np.random.default_rng(0).uniform(0.0, 1.9, (3, 4)).astype(np.float32)
    evidence[0, 0], evidence[1, 3], evidence[2, 3] = 3.0, 5.0, 4.0
    regions = _regions(evidence, calibration)
    assert _boxes(regions) == [(60, 10, 20, 20), (0, 0, 20, 10)]
    assert [region.peak for region in regions] == [5.0, 3.0]


def test_where_no_cell_reaches_the_threshold_the_highest_is_marked(calibration: Calibration) -> None:
    evidence = np.random.default_rng(1).uniform(0.0, 1.0, (3, 4)).astype(np.float32)
    evidence[2, 1] = 1.5
    assert _boxes(_regions(evidence, calibration)) == [(20, 20, 20, 10)]


def test_a_cell_that_is_not_a_number_is_marked_and_hides_no_other(calibration: Calibration) -> None:
    evidence = np.random.default_rng(2).uniform(0.0, 1.0, (3, 4)).astype(np.float32)
    evidence[0, 0] = np.nan
    assert _boxes(_regions(evidence, calibration)) == [(0, 0, 20, 10)]
    evidence[2, 3] = 3.0
    assert sorted(_boxes(_regions(evidence, calibration))) == [(0, 0, 20, 10), (60, 20, 20, 10)]
    assert _boxes(_regions(np.full((3, 4), np.nan, np.float32), calibration)) == [(0, 0, 80, 30)]
