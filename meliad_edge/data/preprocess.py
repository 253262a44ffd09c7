"""The one way an image becomes model input, shared by training, evaluation and every runtime."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def to_model_input(image: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an RGB image to the size a model takes.

    Area interpolation when shrinking (no aliasing), bilinear when growing. The aspect ratio is not kept:
    the whole image is inspected. Normalisation happens inside the exported graph.

    Args:
        image: uint8 [H, W, 3].
        size_hw: Height and width of the result in pixels.

    Returns:
        uint8 [height, width, 3], contiguous; the image itself when it already has that size.
    """
    height, width = size_hw
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    shrinks = image.shape[0] * image.shape[1] > height * width
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8)
