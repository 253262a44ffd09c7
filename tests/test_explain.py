from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meliad_edge.calibrate import calibrate
from meliad_edge.explain import colour_bar, map_to_colour, overlay, save_explanation
from meliad_edge.runtime.predictor import Prediction, Region, StageTimes

RANGE = (-1.0, 2.0)
maps = hnp.arrays(np.float32, (5, 7), elements=st.floats(-5, 5, width=32))


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@given(
    evidence=hnp.arrays(np.float32, (5, 7), elements=st.floats(-100, -1, width=32)),
    image=hnp.arrays(np.uint8, (20, 28, 3)),
)
def test_a_part_at_or_below_the_low_end_stays_clean(evidence: np.ndarray, image: np.ndarray) -> None:
    assert (overlay(image, evidence, RANGE) == image).all()


@given(evidence=maps, other=st.floats(-5, 5, width=32))
def test_a_colour_depends_on_its_own_value_alone(evidence: np.ndarray, other: float) -> None:
    changed = evidence.copy()
    changed[0, 0] = other  # Would shift every colour if the scale came from the image.
    before, after = map_to_colour(evidence, RANGE), map_to_colour(changed, RANGE)
    assert (before.reshape(-1, 3)[1:] == after.reshape(-1, 3)[1:]).all()


def test_a_far_cell_does_not_change_the_overlay_here(image: np.ndarray) -> None:
    quiet = np.full((5, 7), 0.5, np.float32)
    loud = quiet.copy()
    loud[-1, -1] = 50.0
    assert (overlay(image, quiet, RANGE)[:30, :40] == overlay(image, loud, RANGE)[:30, :40]).all()


def test_values_beyond_the_scale_have_its_end_colours() -> None:
    colours = map_to_colour(np.array([[-9, -1, 2, 9, np.inf, -np.inf, np.nan]], np.float32), RANGE)[0]
    assert (colours[0] == colours[1]).all() and (colours[5] == colours[1]).all()
    assert all((colours[i] == colours[2]).all() for i in (3, 4, 6))
    assert (colours[1] != colours[2]).any()


def test_more_evidence_is_lighter_and_more_opaque() -> None:
    colours = map_to_colour(np.linspace(*RANGE, 64, dtype=np.float32)[np.newaxis], RANGE)
    lightness = cv2.cvtColor(colours, cv2.COLOR_RGB2LAB)[0, :, 0].astype(int)
    assert (np.diff(lightness) >= 0).all()
    grey = np.full((8, 8, 3), 128, np.uint8)
    changes = []
    for value in (-1.0, 0.0, 1.0, 2.0):
        drawn = overlay(grey, np.full((2, 2), value, np.float32), RANGE)
        changes.append(int(np.abs(drawn.astype(int) - 128).max()))
    assert changes[0] == 0
    assert all(a < b for a, b in zip(changes, changes[1:], strict=False))


def test_evidence_is_drawn_where_it_is(image: np.ndarray) -> None:
    evidence = np.full((5, 7), -2.0, np.float32)
    evidence[2, 5] = 2.0
    changed = (overlay(image, evidence, RANGE) != image).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max()) == pytest.approx((15, 34), abs=1)  # the cell and half a cell around it
    assert (columns.min(), columns.max()) == pytest.approx((45, 64), abs=1)


def test_the_image_is_not_changed(image: np.ndarray) -> None:
    before = image.copy()
    overlay(image, np.full((5, 7), 2.0, np.float32), RANGE, [Region(3, 4, 20, 10, 2.0)], caption="score 2.00")
    assert (image == before).all()


def test_regions_are_outlined_even_at_the_border(image: np.ndarray) -> None:
    clean = np.full((5, 7), -2.0, np.float32)
    drawn = overlay(image, clean, RANGE, [Region(0, 0, 70, 50, 1.0), Region(20, 10, 30, 20, 1.0)])
    assert (drawn[[10, 29], 20:50] == 255).all() and (drawn[10:30, [20, 49]] == 255).all()
    assert (drawn[0] == 255).all() and (drawn[-1] == 255).all()
    assert (drawn[15:25, 25:45] == image[15:25, 25:45]).all()


def test_a_caption_is_written(image: np.ndarray) -> None:
    clean = np.full((5, 7), -2.0, np.float32)
    drawn = overlay(image, clean, RANGE, caption="1.9")
    assert (drawn[:15, :15] != image[:15, :15]).any()
    assert (drawn[30:] == image[30:]).all()


def test_the_colour_bar_shows_the_scale_and_marks_the_threshold() -> None:
    bar = colour_bar(RANGE, 0.0, size_hw=(40, 301))
    assert bar.shape == (40, 301, 3)
    ends = map_to_colour(np.array([RANGE], np.float32), RANGE)[0]
    assert (bar[5, 0] == ends[0]).all() and (bar[5, -1] == ends[1]).all()
    assert (bar[5, 100] == 0).all()  # a third of the way up
    assert (bar[25:] < 128).any()


def test_an_explanation_is_a_picture_and_the_raw_map(tmp_path: Path, image: np.ndarray) -> None:
    calibration = calibrate([0.1, 0.2, 0.3])
    evidence = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    prediction = Prediction(1.0, 0.3, evidence, (Region(3, 4, 20, 10, 1.0),), StageTimes(0, 0, 0))
    save_explanation(tmp_path / "out", "part", image, prediction, calibration)
    assert (np.load(tmp_path / "out" / "part.npy") == evidence).all()
    picture = cv2.imread(str(tmp_path / "out" / "part.png"))
    assert picture.shape[0] > 50 and picture.shape[1] == 320
