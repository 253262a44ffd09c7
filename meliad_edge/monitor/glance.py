"""A glance at a frame: the few thousand pixels that are looked at every time."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

_SIDE = 64
_TILES = 8
# Levels of 255, of one tile and of the mean of all. Measured on real pictures: noise with a standard deviation of 4 and
# JPEG change them by at most 2.8 and 0.8, another part of the same kind by at least 20 and 1.9.
_SAME_TILE, _SAME_PICTURE = 4.0, 1.25


def glance(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Single pixels of a picture, evenly spread; nothing is averaged, so noise stays noise.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [64, 64, 3].
    """
    return np.asarray(cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_NEAREST), dtype=np.uint8)


def tiles(seen: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A glance in 8 x 8 tiles, each the mean of 64 pixels; float32 [8, 8, 3], 0 to 255."""
    size = (_TILES, _TILES)
    return np.asarray(cv2.resize(seen.astype(np.float32), size, interpolation=cv2.INTER_AREA), dtype=np.float32)


def shows_the_same(first: NDArray[np.float32], second: NDArray[np.float32]) -> bool:
    """Whether two pictures, by their tiles, differ by noise alone."""
    difference = np.abs(first - second)
    return bool(difference.max() <= _SAME_TILE and difference.mean() <= _SAME_PICTURE)
