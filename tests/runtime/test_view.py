from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meliad_edge.calibrate import Calibration
from meliad_edge.errors import UsageError
from meliad_edge.runtime.engine import RawScores
from meliad_edge.runtime.predictor import Predictor
from meliad_edge.runtime.view import WHOLE, Box, View

TOP_CELLS, OFFSET, THRESHOLD = 3, 0.5, 130.0
CALIBRATION = Calibration(THRESHOLD, 0.01, 0.01, 0.02, (60.0, 80.0, 100.0), OFFSET)


class CellEngine:
    """Evidence of a cell: the mean level of its 8x8 pixels; nearest prototypes: its place in the tile."""

    name = "cells"
    input_size_hw = (32, 32)

    def infer(self, frames: np.ndarray[Any, Any]) -> RawScores:
        cells = frames.astype(np.float64).mean(axis=3).reshape(len(frames), 4, 8, 4, 8).mean(axis=(2, 4))
        top = np.sort(cells.reshape(len(frames), -1), axis=1)[:, -TOP_CELLS:]
        place = np.broadcast_to(np.arange(16).reshape(1, 1, 4, 4), (len(frames), 2, 4, 4))
        return RawScores((top.mean(axis=1) + OFFSET).astype(np.float32), cells.astype(np.float32), place)


class Manifest:
    grid_hw = (4, 4)
    top_cells: int | None = TOP_CELLS
    detector = "cells"


class CellBundle:
    calibration = CALIBRATION
    exemplars = ()
    manifest = Manifest()


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(CellBundle(), CellEngine(), "fp32")  # type: ignore[arg-type]


def picture(size_hw: tuple[int, int] = (64, 96), seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 120, (*size_hw, 3), dtype=np.uint8)


def test_the_whole_view_changes_nothing(predictor: Predictor) -> None:
    image = picture((32, 32))
    whole, viewed = predictor.predict_all([(image, WHOLE), (image, View())])
    assert whole.score == pytest.approx(viewed.score, abs=1e-4)
    np.testing.assert_array_equal(whole.map, viewed.map)


def test_tiles_see_what_the_whole_picture_averages_away(predictor: Predictor) -> None:
    image = picture((64, 96))
    image[40:48, 72:80] = 255  # One cell of a tile, a quarter of a cell and less of the whole.
    whole, tiled = predictor.predict_all([(image, WHOLE), (image, View(tiles=(2, 3)))])
    assert whole.regions == ()
    assert tiled.map.shape == (8, 12)
    assert np.unravel_index(tiled.map.argmax(), tiled.map.shape) == (5, 9)
    assert tiled.map[5, 9] == 255


def test_the_score_of_a_view_is_the_mean_of_the_top_cells_of_the_map_that_is_shown(predictor: Predictor) -> None:
    for seed in range(5):
        image = picture(seed=seed)
        ignored = np.zeros((64, 96), np.uint8)
        ignored[: 16 + 8 * seed, :48] = 1
        (prediction,) = predictor.predict_all([(image, View(tiles=(2, 2), ignored=ignored))])
        cells = sorted(float(cell) for cell in prediction.map.ravel() if np.isfinite(cell))
        assert len(cells) < 64
        assert prediction.score == pytest.approx(sum(cells[-TOP_CELLS:]) / TOP_CELLS + OFFSET, abs=1e-4)


def test_regions_are_named_in_pixels_of_the_whole_picture(predictor: Predictor) -> None:
    image = np.full((100, 200, 3), 20, np.uint8)
    image[60:76, 140:156] = 255
    (prediction,) = predictor.predict_all([(image, View(region=Box(100, 36, 64, 64), tiles=(2, 2)))])
    assert prediction.is_anomaly
    assert prediction.area == Box(100, 36, 64, 64)
    (region,) = prediction.regions
    # Cells of 8 pixels that begin at 100, 36.
    assert (region.x, region.y, region.width, region.height) == (140, 60, 16, 16)


def test_what_is_masked_raises_no_alarm_and_the_rest_still_does(predictor: Predictor) -> None:
    image = np.full((32, 32, 3), 20, np.uint8)
    image[0:16, 0:16] = 255
    ignored = np.zeros((32, 32), np.uint8)
    ignored[0:16, 0:16] = 255
    plain, masked = predictor.predict_all([(image, WHOLE), (image, View(ignored=ignored))])
    assert plain.is_anomaly and not masked.is_anomaly
    assert np.isneginf(masked.map[:2, :2]).all()
    image[16:32, 16:32] = 255
    (other,) = predictor.predict_all([(image, View(ignored=ignored))])
    assert other.is_anomaly
    assert {(r.x, r.y) for r in other.regions} == {(16, 16)}


def test_a_cell_that_is_not_a_number_still_alarms_in_a_view(predictor: Predictor) -> None:
    engine = predictor.engine
    infer = engine.infer

    def broken(frames: Any) -> RawScores:
        raw = infer(frames)
        raw.map[0, 2, 2] = np.nan
        return raw

    engine.infer = broken  # type: ignore[method-assign]
    (prediction,) = predictor.predict_all([(picture((32, 32)), View(tiles=(1, 2)))])
    assert prediction.is_anomaly


def test_several_views_share_one_call_of_the_engine(predictor: Predictor) -> None:
    sizes: list[int] = []
    infer = predictor.engine.infer

    def counted(frames: Any) -> RawScores:
        sizes.append(len(frames))
        return infer(frames)

    predictor.engine.infer = counted  # type: ignore[method-assign]
    views = [(picture(seed=1), WHOLE), (picture(seed=2), View(tiles=(2, 2))), (picture(seed=3), WHOLE)]
    together = predictor.predict_all(views)
    assert sizes == [6]
    for prediction, view in zip(together, views, strict=True):
        (alone,) = predictor.predict_all([view])
        assert prediction.score == alone.score
        np.testing.assert_array_equal(prediction.map, alone.map)


@pytest.mark.parametrize(
    ("view", "said"),
    [
        (View(region=Box(90, 0, 20, 20)), "region 90,0,20,20 does not lie in the picture, which is 96x64"),
        (View(region=Box(-1, 0, 20, 20)), "does not lie in the picture"),
        (View(ignored=np.zeros((32, 32), np.uint8)), "the mask is 32x32, the picture 96x64"),
        (View(ignored=np.ones((64, 96), np.uint8)), "covers all that is looked at"),
        (View(region=Box(0, 0, 2, 2), tiles=(3, 3)), "3x3 tiles do not fit into 2x2 pixels"),
    ],
)
def test_a_view_that_does_not_fit_is_one_clear_error(predictor: Predictor, view: View, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        predictor.predict_all([(picture(), view)])


def test_a_score_that_is_not_read_off_the_map_cannot_be_masked(predictor: Predictor) -> None:
    class Other(Manifest):
        top_cells = None

    predictor.bundle.manifest = Other()  # type: ignore[misc, assignment]
    (tiled,) = predictor.predict_all([(picture(), View(tiles=(2, 2)))])
    assert tiled.score > 0
    with pytest.raises(UsageError, match="nothing can be masked"):
        predictor.predict_all([(picture(), View(ignored=np.eye(64, 96, dtype=np.uint8)))])
    with pytest.raises(UsageError, match="nothing can be masked"):
        predictor.check_mask(View(ignored=np.eye(64, 96, dtype=np.uint8)))


def test_a_mask_is_checked_before_the_first_picture(predictor: Predictor) -> None:
    stripes = np.ones((64, 96), np.uint8)
    stripes[:, ::3] = 0  # A third is free, but of no cell half.
    with pytest.raises(UsageError, match="covers all that is looked at"):
        predictor.check_mask(View(ignored=stripes))
    stripes[:24, :24] = 0
    predictor.check_mask(View(ignored=stripes))
    with pytest.raises(UsageError, match="covers all that is looked at"):
        predictor.check_mask(View(region=Box(24, 0, 72, 64), ignored=stripes))
    stripes[:] = 1
    stripes[:8, :12] = 0  # Half a cell's height and width of the whole, a cell of four tiles.
    with pytest.raises(UsageError, match="covers all that is looked at"):
        predictor.check_mask(View(ignored=stripes))
    predictor.check_mask(View(tiles=(2, 2), ignored=stripes))


def test_the_picture_of_a_decision_is_drawn_where_the_view_is(tmp_path: Path, predictor: Predictor) -> None:
    from meliad_edge.explain import overlay

    image = np.full((64, 96, 3), 20, np.uint8)
    image[32:48, 48:64] = 255
    (prediction,) = predictor.predict_all([(image, View(region=Box(32, 16, 48, 48)))])
    drawn = overlay(image, prediction.map, (20.0, 260.0), area=prediction.area)
    changed = (drawn != image).any(axis=2)
    assert changed[32:48, 48:64].any()
    outside = np.ones_like(changed)
    outside[16:64, 32:80] = False
    assert not changed[outside].any()
