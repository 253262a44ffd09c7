from __future__ import annotations

import numpy as np
import pytest

from meliad_edge.data.preprocess import to_model_input


@pytest.mark.parametrize(
    "side_hw", [(480, 640), (360, 640), (720, 1280), (1080, 1920), (300, 300), (765, 765), (97, 1031)]
)
def test_every_pixel_of_a_frame_counts(side_hw: tuple[int, int]) -> None:
    """A line one pixel wide, wherever it is, leaves a trace: a thin scratch must not fall between two samples."""
    height, width = side_hw
    rng = np.random.default_rng(height)
    for axis, length in ((0, height), (1, width)):
        for position in rng.choice(length, 40, replace=False):
            image = np.zeros((height, width, 3), np.uint8)
            image[position if axis == 0 else slice(None), position if axis == 1 else slice(None)] = 255
            assert to_model_input(image, (256, 256)).max() > 0, (axis, position)


def test_a_plain_image_stays_plain() -> None:
    image = np.full((731, 1203, 3), 93, np.uint8)
    assert (to_model_input(image, (256, 256)) == 93).all()


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_model_input(image, (64, 96)), image)
    mirrored = to_model_input(image[:, ::-1], (64, 96))
    assert mirrored.flags.c_contiguous
