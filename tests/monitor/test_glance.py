from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from meliad_edge.monitor.glance import glance, shows_the_same, tiles

Image = NDArray[np.uint8]


def belt(left: int, level: int = 150) -> Image:
    image = cv2.resize(np.random.default_rng(0).integers(60, 160, (9, 16, 3), dtype=np.uint8), (1280, 720))
    image[200:500, left : left + 300] = level
    return np.asarray(image, dtype=np.uint8)


def seen(image: Image, seed: int) -> NDArray[np.float32]:
    noisy = image + np.random.default_rng(seed).normal(0, 4, image.shape)
    return tiles(glance(np.clip(noisy, 0, 255).astype(np.uint8)))


def test_a_glance_is_pixels_of_the_picture() -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    pixels = {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()}
    looked_at = glance(image)
    assert looked_at.shape == (64, 64, 3)
    assert all(tuple(pixel) in pixels for pixel in looked_at.reshape(-1, 3).tolist())


def test_tiles_are_means() -> None:
    looked_at = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    direct = looked_at.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(tiles(looked_at), direct, rtol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_noise_changes_nothing_and_a_part_does(seed: int) -> None:
    first = seen(belt(300), seed)
    assert shows_the_same(first, seen(belt(300), 100 + seed))
    assert not shows_the_same(first, seen(belt(500), 100 + seed))
    assert not shows_the_same(first, seen(belt(300, level=120), 100 + seed))
