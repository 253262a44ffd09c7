"""The definition of the operator ``meliad.EvenLight``: every implementation is tested against this file."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def even_light(
    frames: NDArray[np.uint8], *, mean: float, spread: float, smallest_spread: float, shift: Any, scale: Any
) -> NDArray[np.float64]:
    """Bring every image to the same brightness and spread, then normalise it for the network. Ours.

    Args:
        frames: uint8 RGB [N, H, W, 3].
        mean: Mean over all pixels and colours afterwards, of 255, before values below 0 and above 255 are clipped.
        spread: Standard deviation afterwards, of an image that has much of it.
        smallest_spread: Added to the standard deviation of the image, so that a flat one is stretched less.
        shift: Subtracted from the colours afterwards; one number for all or three.
        scale: Multiplied with the difference.

    Returns:
        [N, 3, H, W].
    """
    images = []
    for frame in frames.astype(np.float64):
        evened = (frame - frame.mean()) * (spread / (frame.std() + smallest_spread)) + mean
        images.append(np.moveaxis((evened.clip(0, 255) - np.asarray(shift)) * np.asarray(scale), -1, 0))
    return np.stack(images)
