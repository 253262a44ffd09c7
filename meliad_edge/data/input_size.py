"""Which sizes of the model's input suit a set of images: their shape, and how many pixels are worth having [ours]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

BASE_AREA = 256 * 256
# The coarsest stride of the backbones.
_STEP = 32
_SMALLEST_SIDE = 64
# What a bundle may hold.
_LARGEST_SIDE = 1024
# How far the aspect ratios of most images may be from their median.
_RATIO_TOLERANCE = 0.1
# An input with nearly the pixels of the images shows little that a smaller one does not.
_NATIVE_PIXELS = 1.5


def common_aspect_ratio(image_sizes: Sequence[tuple[int, int]]) -> float | None:
    """Height over width that the images agree on: their median, None when they do not agree.

    They agree when the 10th and the 90th percentile are within 10 % of the median. Images of different shapes are
    squashed into a square, which was measured to be better than padding.

    Args:
        image_sizes: Heights and widths in pixels, all above 0; may be empty, which is no agreement.
    """
    if not image_sizes:
        return None
    low, median, high = np.quantile([height / width for height, width in image_sizes], (0.1, 0.5, 0.9))
    agree = (1 - _RATIO_TOLERANCE) * median <= low and high <= (1 + _RATIO_TOLERANCE) * median
    return float(median) if agree else None


def largest_size(image_sizes: Sequence[tuple[int, int]], budget: float) -> tuple[int, int]:
    """The largest input that images have the pixels for and a budget allows.

    It has about the area of 256 x 256 pixels and the images' common aspect ratio, or is square when they have none.
    The area is doubled as far as the budget goes, the images have at least 1.5 times the pixels of the input, and no
    side exceeds 1,024.

    Args:
        image_sizes: Heights and widths of the training images in pixels.
        budget: Largest area, before sides are rounded, in areas of 256 x 256 pixels.

    Returns:
        Height and width, multiples of 32 from 64 to 1,024.
    """
    ratio = common_aspect_ratio(image_sizes) or 1.0
    native_area = float(np.median([height * width for height, width in image_sizes])) if image_sizes else 0.0
    largest = _rounded_size(BASE_AREA, ratio)
    area = 2 * BASE_AREA
    while area <= budget * BASE_AREA and area * max(ratio, 1 / ratio) <= _LARGEST_SIDE**2:
        height, width = _rounded_size(area, ratio)
        if native_area < _NATIVE_PIXELS * height * width:
            break
        largest = height, width
        area *= 2
    return largest


def in_words(size_hw: tuple[int, int]) -> str:
    """Width and height, in this order, as messages about images have them."""
    return f"{size_hw[1]} x {size_hw[0]}"


def _rounded_size(area: float, ratio: float) -> tuple[int, int]:
    """Sides of about that area and ratio; a wrong ratio counts twice as much as a wrong area."""

    def error(size: tuple[int, int]) -> float:
        height, width = size
        return 2 * abs(math.log(height / width / ratio)) + abs(math.log(height * width / area))

    return min(product(_multiples(math.sqrt(area * ratio)), _multiples(math.sqrt(area / ratio))), key=error)


def _multiples(side: float) -> tuple[int, int]:
    """The multiples of the step below and above a side, within the limits."""
    below, above = math.floor(side / _STEP) * _STEP, math.ceil(side / _STEP) * _STEP
    return _within_limits(below), _within_limits(above)


def _within_limits(side: int) -> int:
    return min(max(side, _SMALLEST_SIDE), _LARGEST_SIDE)
