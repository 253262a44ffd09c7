"""The one way an image becomes model input, shared by training, evaluation and every runtime."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

# Up to this factor bilinear interpolation still looks at nearly every pixel; beyond it, detail would alias.
_BILINEAR_LIMIT = 3.0


def to_model_input(image: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an RGB image to the size a model takes.

    Large images are first averaged over squares of 2, 4, 8 ... pixels, then interpolated bilinearly: free of
    aliasing, and several times faster than exact area weights. The aspect ratio is not kept: the whole image is
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
        image.shape[0] >= 2 * factor * height and image.shape[1] >= 2 * factor * width
    ):
        factor *= 2
    if factor > 1:
        averaged_hw = image.shape[0] // factor, image.shape[1] // factor
        image = np.asarray(cv2.resize(image, averaged_hw[::-1], interpolation=cv2.INTER_AREA), dtype=np.uint8)
    shrinkage = max(image.shape[0] / height, image.shape[1] / width)
    interpolation = cv2.INTER_LINEAR if shrinkage <= _BILINEAR_LIMIT else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), dtype=np.uint8)
