"""The one way an image becomes model input, shared by training, evaluation and every runtime."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

# Up to this factor bilinear interpolation looks at every pixel; beyond it, a thin defect could fall between two.
_BILINEAR_LIMIT = 2.0
# Averaging may undershoot the target by so much: less is lost than the exact area weights would cost in time.
_SMALLEST_SHARE = 0.9


def to_model_input(image: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an RGB image to the size a model takes.

    Large images are first averaged over squares of 2, 4, 8 ... pixels, then interpolated bilinearly; where more than
    a factor of two is left, area weights take over. Every pixel counts, and most camera frames are several times
    faster than with area weights alone. The aspect ratio is not kept: the whole image is
    inspected. Normalisation happens inside the exported graph.

    Args:
        image: uint8 [H, W, 3].
        size_hw: Height and width of the result in pixels.

    Returns:
        uint8 [height, width, 3], contiguous; the image itself when it already has that size.
    """
    height, width = size_hw
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    factor = 1
    while all(side % (2 * factor) == 0 for side in image.shape[:2]) and (
        image.shape[0] >= 2 * factor * _SMALLEST_SHARE * height
        and image.shape[1] >= 2 * factor * _SMALLEST_SHARE * width
    ):
        factor *= 2
    if factor > 1:
        image = _resize(image, (image.shape[0] // factor, image.shape[1] // factor), cv2.INTER_AREA)
    if max(image.shape[0] / height, image.shape[1] / width) > _BILINEAR_LIMIT:
        # OpenCV takes area weights only where neither side grows.
        image = _resize(image, (min(image.shape[0], height), min(image.shape[1], width)), cv2.INTER_AREA)
    return _resize(image, (height, width), cv2.INTER_LINEAR)


def _resize(image: NDArray[np.uint8], size_hw: tuple[int, int], interpolation: int) -> NDArray[np.uint8]:
    if image.shape[:2] == size_hw:
        return image
    return np.asarray(cv2.resize(image, size_hw[::-1], interpolation=interpolation), dtype=np.uint8)
