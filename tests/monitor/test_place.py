from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from meliad_edge.monitor.place import Place, PlaceMonitor

Image = NDArray[np.uint8]
HW = (360, 640)
EDGE = 120
LEARNING, DECIDING = 9, 5


def scene(seed: int) -> Image:
    """Rectangles of all sizes, with room around what is seen of it."""
    rng = np.random.default_rng(seed)
    image = np.full((HW[0] + 2 * EDGE, HW[1] + 2 * EDGE, 3), 90, np.uint8)
    for _ in range(500):
        x, y = rng.integers(0, image.shape[1::-1]).tolist()
        width, height = rng.integers(8, 60, 2).tolist()
        cv2.rectangle(image, (x, y), (x + width, y + height), (int(rng.integers(40, 200)),) * 3, -1)
    return image


def seen(image: Image, *, right: float = 0.0, down: float = 0.0, turn_deg: float = 0.0) -> Image:
    """The picture after the scene moved in it."""
    height, width = image.shape[:2]
    transform = cv2.getRotationMatrix2D((width / 2, height / 2), -turn_deg, 1.0)
    transform[:, 2] += right * HW[1], down * HW[1]
    moved = cv2.warpAffine(image, transform, (width, height))
    return np.ascontiguousarray(moved[EDGE : EDGE + HW[0], EDGE : EDGE + HW[1]])


def show(monitor: PlaceMonitor, image: Image, times: int = DECIDING) -> Place | None:
    rng = np.random.default_rng(1)
    place = None
    for _ in range(times):
        place = monitor.update(np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8))
    return place


def learned(image: Image) -> PlaceMonitor:
    monitor = PlaceMonitor(LEARNING, DECIDING)
    assert show(monitor, image, LEARNING) is None
    return monitor


def corner_share(right: float, down: float, turn_deg: float) -> float:
    """How far the farthest corner goes, from plain geometry."""
    turn = np.radians(turn_deg)
    farthest = 0.0
    for x in (-0.5, 0.5):
        for y in (-0.5 * HW[0] / HW[1], 0.5 * HW[0] / HW[1]):
            to_x, to_y = x * np.cos(turn) - y * np.sin(turn) + right, x * np.sin(turn) + y * np.cos(turn) + down
            farthest = max(farthest, float(np.hypot(to_x - x, to_y - y)))
    return farthest


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("right", "down", "turn_deg"),
    [(0.02, 0, 0), (-0.05, 0.01, 0), (0, -0.08, 0), (0, 0, 1.5), (0, 0, -3), (0.03, 0.02, 1)],
)
def test_shift_and_turn_are_measured(seed: int, right: float, down: float, turn_deg: float) -> None:
    image = scene(seed)
    place = show(learned(seen(image)), seen(image, right=right, down=down, turn_deg=turn_deg))
    assert place is not None
    assert place.movement is not None
    assert place.movement.share == pytest.approx(corner_share(right, down, turn_deg), abs=0.004)
    assert place.movement.turn_deg == pytest.approx(turn_deg, abs=0.3)


@pytest.mark.parametrize("seed", range(4))
def test_what_stays_where_it_was_has_not_moved(seed: int) -> None:
    image = seen(scene(seed))
    for light in (0.7, 1.0, 1.2):
        place = show(learned(image), cv2.convertScaleAbs(image, alpha=light))
        assert place is not None
        assert place.found_share > 0.9
        assert place.movement is not None
        assert place.movement.share == 0.0


def test_a_part_that_stops_hides_what_is_behind_it() -> None:
    image = seen(scene(0))
    part = image.copy()
    part[:, 200:440] = seen(scene(5))[:, 200:440]
    place = show(learned(image), part)
    assert place is not None
    assert place.movement is not None
    assert place.movement.share < 0.003


def test_a_belt_that_stopped_elsewhere_is_contradicted_by_the_frame_around_it() -> None:
    image = seen(scene(0))
    belt = image.copy()
    belt[100:260] = seen(scene(0), right=0.06)[100:260]
    place = show(learned(image), belt)
    assert place is not None
    assert place.movement is None or place.movement.share < 0.003


@pytest.mark.parametrize("turn_deg", [0.0, 2.0])
def test_the_date_that_a_camera_writes_stays_where_it_is_and_contradicts_nothing(turn_deg: float) -> None:
    def with_date(image: Image) -> Image:
        for text, y in (("2026-11-26 CAMERA 3", 22), ("HALL 2, BELT 7, ABC", HW[0] - 8)):
            cv2.putText(image, text, (10, y), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (255, 255, 255), 2)
        return image

    image = scene(0)
    plain = np.ones(image.shape[:2], bool)
    plain[EDGE + 70 : EDGE + 270, EDGE + 120 : EDGE + 420] = False
    image[plain] = 90  # So that letters are much of what stands still.
    place = show(learned(with_date(seen(image))), with_date(seen(image, right=0.04, turn_deg=turn_deg)))
    assert place is not None
    assert place.movement is not None
    assert place.movement.share == pytest.approx(corner_share(0.04, 0.0, turn_deg), abs=0.004)


def test_another_scene_is_not_found() -> None:
    place = show(learned(seen(scene(0))), seen(scene(9)))
    assert place is not None
    assert place.found_share < 0.1
    assert place.movement is None


def test_a_straight_rail_cannot_be_placed() -> None:
    rails = np.full((*HW, 3), 90, np.uint8)
    rails[60:80], rails[300:310] = 200, 30
    assert show(learned(rails), np.roll(rails, 12, axis=0)) is None


def test_noise_is_no_background() -> None:
    assert show(learned(np.full((*HW, 3), 100, np.uint8)), np.full((*HW, 3), 100, np.uint8)) is None


def test_what_moved_while_it_was_learned_is_no_background() -> None:
    monitor = PlaceMonitor(LEARNING, DECIDING)
    wide = scene(0)
    for step in range(LEARNING):
        monitor.update(seen(wide, right=0.015 * step))
    assert show(monitor, seen(wide)) is None
