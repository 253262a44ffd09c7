from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meliad_edge.monitor.sharpness import SharpnessMonitor, edge_width_px

Image = NDArray[np.uint8]


def step_edges(blur_px: float) -> Image:
    """Stripes 80 pixels wide whose edges lie in the middle of what is looked at, blurred."""
    row = np.where((np.arange(1280) + 64) // 80 % 2 == 0, 40.0, 200.0)
    image = np.tile(row, (288, 1))
    if blur_px > 0.0:
        image = cv2.GaussianBlur(image, (0, 0), blur_px)
    return np.repeat(np.rint(image).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("blur_px", [1.0, 2.0, 4.0])
def test_a_blurred_step_is_as_wide_as_it_is_by_definition(blur_px: float) -> None:
    # The steepest slope of a step of height 1 is 1 / (s sqrt(2 pi)).
    image = step_edges(blur_px)
    assert edge_width_px(image) == pytest.approx(np.sqrt(2 * np.pi) * blur_px, rel=0.1)


def test_light_and_contrast_change_nothing() -> None:
    image = step_edges(2.0)
    usual = edge_width_px(image)
    assert usual is not None
    for alpha, beta in [(0.6, 0.0), (0.6, 100.0), (1.2, 0.0)]:
        assert edge_width_px(cv2.convertScaleAbs(image, alpha=alpha, beta=beta)) == pytest.approx(usual, rel=0.05)


def test_the_date_that_a_camera_writes_stays_sharp_and_does_not_count() -> None:
    image = step_edges(3.0)
    usual = edge_width_px(image)
    cv2.putText(image, "2026-11-26 12:03:41  CAMERA 3  HALL 2", (8, 26), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (255,) * 3, 2)
    assert edge_width_px(image) == usual


def test_noise_alone_has_no_edges() -> None:
    noise = np.random.default_rng(0).normal(100, 5, (720, 1280, 3))
    assert edge_width_px(np.clip(noise, 0, 255).astype(np.uint8)) is None


def direct_edge_width(image: Image) -> float | None:
    """Block by block, pixel by pixel."""
    height, width = image.shape[:2]
    rows, columns = min(9, height // 32), min(16, width // 32)
    figures = []
    for row in range(1, rows - 1):
        for column in range(columns):
            top, left = row * (height // rows), column * (width // columns)
            block = [[int(image[top + y, left + x, 1]) for x in range(32)] for y in range(32)]
            values = [value for line in block for value in line]
            steepest = 1
            for y in range(32):
                for x in range(32):
                    if x > 0:
                        steepest = max(steepest, abs(block[y][x] - block[y][x - 1]))
                    if y > 0:
                        steepest = max(steepest, abs(block[y][x] - block[y - 1][x]))
            figures.append((max(values) - min(values), steepest))
    chosen = [figure for figure in sorted(figures, key=lambda figure: figure[0])[-16:] if figure[0] >= 48]
    if len(chosen) < 3:
        return None
    return float(np.quantile([contrast / steepest for contrast, steepest in chosen], 0.25))


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 170),
    width=st.integers(1, 130),
    blur=st.sampled_from([0.1, 1.0, 3.0]),
    contrast=st.sampled_from([10, 60, 127]),
    seed=st.integers(0, 1000),
)
def test_it_is_what_a_direct_computation_gives(height: int, width: int, blur: float, contrast: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = cv2.GaussianBlur(rng.normal(128, contrast, (height, width, 3)), (0, 0), blur).reshape(height, width, 3)
    image = np.clip(image, 0, 255).astype(np.uint8)
    ranges = sorted(contrasts(image))
    # Which of two blocks with the same contrast is taken is not defined.
    if len(ranges) > 16 and ranges[-16] == ranges[-17]:
        return
    assert edge_width_px(image) == direct_edge_width(image)


def contrasts(image: Image) -> list[int]:
    height, width = image.shape[:2]
    rows, columns = min(9, height // 32), min(16, width // 32)
    return [
        int(np.ptp(image[row * (height // rows) :, column * (width // columns) :, 1][:32, :32]))
        for row in range(1, rows - 1)
        for column in range(columns)
    ]


def test_one_sharp_picture_ends_a_blur() -> None:
    sharp, blurred = step_edges(0.8), step_edges(3.0)
    monitor = SharpnessMonitor(learning_looks=6, deciding_looks=3, blurred_ratio=1.8)
    assert [bool(monitor.update(image)) for image in [sharp] * 6 + [blurred] * 5 + [sharp] + [blurred] * 3] == (
        [False] * 8 + [True] * 3 + [False] * 3 + [True]
    )


def test_a_picture_without_edges_says_nothing() -> None:
    sharp, blurred = step_edges(0.8), step_edges(3.0)
    plain = np.full_like(sharp, 90)
    monitor = SharpnessMonitor(learning_looks=2, deciding_looks=2, blurred_ratio=1.8)
    shown = [plain, sharp, plain, sharp, plain, blurred, plain, blurred, plain]
    assert [bool(monitor.update(image)) for image in shown] == [False] * 7 + [True] * 2


def test_two_kinds_of_parts_are_both_usual() -> None:
    sharp, round_edged = step_edges(0.8), step_edges(2.0)
    monitor = SharpnessMonitor(learning_looks=8, deciding_looks=2, blurred_ratio=1.8)
    shown = [sharp] * 5 + [round_edged] * 3 + [round_edged] * 6
    assert not any(monitor.update(image) for image in shown)
    assert [bool(monitor.update(step_edges(4.0))) for _ in range(2)] == [False, True]
