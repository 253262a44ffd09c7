from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meliad_edge.calibrate import calibrate
from meliad_edge.exemplars import EXEMPLAR_SIZE, Exemplar
from meliad_edge.explain import colour_bar, explanation, map_to_colour, overlay, save_explanation
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


CALIBRATION = calibrate([0.1, 0.2, 0.3])
RED, BLUE, GREEN = (200, 30, 30), (30, 30, 200), (30, 200, 30)


def exemplar(colour: tuple[int, int, int], name: str = "a.png") -> Exemplar:
    patch = np.full((EXEMPLAR_SIZE, EXEMPLAR_SIZE, 3), colour, np.uint8)
    return Exemplar("scratch", name, 0, 0, EXEMPLAR_SIZE, EXEMPLAR_SIZE, patch)


def decided(evidence: np.ndarray, *regions: Region) -> Prediction:
    return Prediction(1.0, 0.3, evidence, regions, StageTimes(0, 0, 0))


def of_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.asarray((picture == colour).all(axis=2))


def test_an_explanation_is_a_picture_and_the_raw_map(tmp_path: Path, image: np.ndarray) -> None:
    evidence = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    prediction = decided(evidence, Region(3, 4, 20, 10, 1.0))
    save_explanation(tmp_path / "out", "part", image, prediction, CALIBRATION)
    assert (np.load(tmp_path / "out" / "part.npy") == evidence).all()
    picture = cv2.imread(str(tmp_path / "out" / "part.png"))
    assert picture is not None
    assert (picture[..., ::-1] == explanation(image, prediction, CALIBRATION)).all()


@pytest.mark.parametrize("shape", [(50, 70), (300, 300), (480, 640), (1080, 1920), (30, 2000), (600, 20), (3, 3)])
def test_pictures_of_any_shape_are_enlarged_by_a_whole_factor(shape: tuple[int, int]) -> None:
    green = np.full((*shape, 3), GREEN, np.uint8)
    clean = np.full((5, 7), -1.0, np.float32)
    picture = explanation(green, decided(clean), CALIBRATION)
    rows, columns = np.nonzero(of_colour(picture, GREEN))
    height, width = int(rows.max() - rows.min()) + 1, int(columns.max()) + 1
    assert height / shape[0] == width / shape[1] == height // shape[0] >= 1
    assert max(height / 840, width / max(1280, shape[1])) <= 1 or height == shape[0]
    explained = decided(clean, Region(0, 0, 2, 2, 0.5, resembles=exemplar(RED)))
    assert of_colour(explanation(green, explained, CALIBRATION), RED).any()


def test_regions_stand_beside_the_patches_they_were_compared_with() -> None:
    photo = np.full((160, 160, 3), 128, np.uint8)
    photo[64:112, 96:144] = GREEN  # Three by three cells around the peak.
    evidence = np.full((10, 10), -1.0, np.float32)
    evidence[2:6, 2:8] = 0.4
    evidence[5, 7] = 0.9
    region = Region(32, 32, 96, 64, float(evidence[5, 7]), resembles=exemplar(RED), differs_from=exemplar(BLUE))
    picture = explanation(photo, decided(evidence, region), CALIBRATION)
    panel = explanation(photo, decided(evidence), CALIBRATION).shape[1]
    column = picture[:, panel:]
    boxes = []
    for colour in (GREEN, RED, BLUE):
        rows, columns = np.nonzero(of_colour(column, colour))
        boxes.append((rows.min(), rows.max(), columns.min(), columns.max()))
        tile = rows.max() - rows.min() + 1
        assert len(rows) == tile**2 > 100**2  # A full square: the peak patch is cut where the peak is.
    assert len({box[:2] for box in boxes}) == 1
    assert boxes[0][3] < boxes[1][2] and boxes[1][3] < boxes[2][2]
    below = column[boxes[0][1] + 1 :]
    assert all((below[:, box[2] : box[3] + 1] < 128).any() for box in boxes)  # each has its words


def test_only_the_three_highest_regions_are_compared() -> None:
    photo = np.full((160, 160, 3), 128, np.uint8)
    evidence = np.full((10, 10), -1.0, np.float32)
    colours = [(200, 30, 30 + index) for index in range(5)]
    regions = [
        Region(32 * index, 0, 16, 16, 0.9, resembles=exemplar(colour, f"{index}.png"))
        for index, colour in enumerate(colours)
    ]
    picture = explanation(photo, decided(evidence, *regions), CALIBRATION)
    assert [of_colour(picture, colour).any() for colour in colours] == [True, True, True, False, False]


def test_without_training_patches_there_is_no_column() -> None:
    photo = np.full((160, 160, 3), 128, np.uint8)
    evidence = np.full((10, 10), 0.5, np.float32)
    plain = explanation(photo, decided(evidence), CALIBRATION)
    assert explanation(photo, decided(evidence, Region(0, 0, 20, 20, 0.5)), CALIBRATION).shape == plain.shape


@pytest.mark.parametrize("shape", [(160, 160), (1080, 1920)])
def test_words_stay_below_their_own_picture(shape: tuple[int, int]) -> None:
    photo = np.full((*shape, 3), 128, np.uint8)
    evidence = np.full((10, 10), -1.0, np.float32)
    name = "a very long name of a caf\xe9 \udce9 \n picture from line 3 of the plant, 2024-01-01.png"
    region = Region(0, 0, 20, 20, 123456.789, resembles=exemplar(RED, name), differs_from=exemplar(BLUE, name))
    picture = explanation(photo, decided(evidence, region), CALIBRATION)
    panel = explanation(photo, decided(evidence), CALIBRATION).shape[1]
    row = picture[np.nonzero(of_colour(picture, RED))[0].min() :, panel:]
    (red, blue) = (np.nonzero(of_colour(row, colour))[1] for colour in (RED, BLUE))
    between, after = row[:, red.max() + 1 : blue.min()], row[:, blue.max() + 1 :]
    before = row[:, red.min() - (blue.min() - red.max() - 1) : red.min()]
    assert min(between.shape[1], after.shape[1], before.shape[1]) > 5
    assert all((gap == 255).all() for gap in (before, between, after))


@pytest.mark.parametrize("corner", [(0, 0), (140, 140), (70, 0)])
def test_numbers_lie_on_no_region_where_there_is_room(corner: tuple[int, int]) -> None:
    photo = np.full((160, 160, 3), GREEN, np.uint8)
    evidence = np.full((10, 10), -1.0, np.float32)
    region = Region(*corner, 16, 16, 0.9)
    explained = replace(region, resembles=exemplar(RED))
    numbered = explanation(photo, decided(evidence, explained), CALIBRATION)
    plain = explanation(photo, decided(evidence, region), CALIBRATION)
    changed = (numbered[:, : plain.shape[1]] != plain).any(axis=2)
    factor = of_colour(plain, GREEN).any(axis=0).sum() // 160
    top = int(np.nonzero(of_colour(plain, GREEN).any(axis=1))[0].min())
    x, y = (min(max(c + 8 - 24, 0), 160 - 48) * factor for c in corner)
    inside = changed[top + y + 3 : top + y + 48 * factor - 3, x + 3 : x + 48 * factor - 3]
    assert changed.any() and not inside.any()
