"""The definition of the resize and normalisation of a camera frame: the CUDA kernel is tested against this file.

It is what ``meliad_edge.data.preprocess.to_model_input`` asks of OpenCV, without the shortcuts of OpenCV: every step is
two matrices of weights, one for rows and one for columns, and whole grey levels are kept after every step. OpenCV
interpolates bilinearly in integers that it cuts off, so that its result, which the kernel reproduces, is one grey level
below this one for about an eighth of the pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_BILINEAR_LIMIT = 2.0
_SMALLEST_SHARE = 0.9


class ResizePlan(NamedTuple):
    """The steps from a frame to the model; a step that keeps the size changes nothing."""

    factor: int
    averaged_hw: tuple[int, int]
    reduced_hw: tuple[int, int]
    model_hw: tuple[int, int]


def plan_resize(frame_hw: tuple[int, int], model_hw: tuple[int, int]) -> ResizePlan:
    """Choose the squares that are averaged, and whether area weights follow; see ``to_model_input``."""
    factor = 1
    while all(side % (2 * factor) == 0 for side in frame_hw) and all(
        side >= 2 * factor * _SMALLEST_SHARE * target for side, target in zip(frame_hw, model_hw, strict=True)
    ):
        factor *= 2
    averaged = (frame_hw[0] // factor, frame_hw[1] // factor)
    reduced = averaged
    if max(averaged[0] / model_hw[0], averaged[1] / model_hw[1]) > _BILINEAR_LIMIT:
        reduced = (min(averaged[0], model_hw[0]), min(averaged[1], model_hw[1]))
    return ResizePlan(factor, averaged, reduced, model_hw)


def area_weights(pixels: int, samples: int) -> NDArray[np.float64]:
    """Weights [samples, pixels] of samples that share out the pixels evenly, by how much each covers; at most 1:1.

    With a whole number of pixels per sample these are plain averages.
    """
    edges = np.arange(samples + 1) * pixels  # in units of 1 / samples pixel, so that they are whole numbers
    left, right = np.arange(pixels) * samples, np.arange(1, pixels + 1) * samples
    covered = np.minimum(edges[1:, None], right) - np.maximum(edges[:-1, None], left)
    return np.asarray(np.maximum(0, covered) / pixels)


def bilinear_weights(samples: int, pixels: int) -> NDArray[np.float64]:
    """Weights [pixels, samples] of the two samples a pixel lies between, centre to centre; border samples repeat."""
    position = (np.arange(pixels) + 0.5) * samples / pixels - 0.5
    before = np.floor(position).astype(int)
    weights = np.zeros((pixels, samples))
    rows = np.arange(pixels)
    np.add.at(weights, (rows, np.clip(before, 0, samples - 1)), 1 - (position - before))
    np.add.at(weights, (rows, np.clip(before + 1, 0, samples - 1)), position - before)
    return weights


def resize(image: NDArray[np.uint8], model_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Resize to model size, before the last step is rounded to grey levels.

    Args:
        image: uint8 [H, W, 3].
        model_hw: Height and width of the result in pixels.

    Returns:
        [height, width, 3], in [0, 255].
    """
    plan = plan_resize((image.shape[0], image.shape[1]), model_hw)
    # OpenCV rounds averages over 2 x 2 pixels half up, everything else half to even.
    averaged = _apply(area_weights, image.astype(np.float64), plan.averaged_hw)
    reduced = _apply(area_weights, np.floor(averaged + 0.5) if plan.factor == 2 else np.rint(averaged), plan.reduced_hw)
    if plan.reduced_hw != plan.model_hw:
        # A tie is a tie, whatever the last bits of float64 say.
        return _apply(bilinear_weights, np.rint(reduced.round(9)), plan.model_hw)
    return averaged if plan.averaged_hw == plan.model_hw else reduced


def normalise(rgb: NDArray[np.uint8], mean: Any, deviation: Any) -> NDArray[np.float64]:
    """(value / 255 - mean) / deviation of every channel: [H, W, 3] to planes [3, H, W]."""
    return np.moveaxis((rgb / 255 - np.asarray(mean)) / np.asarray(deviation), -1, 0)


def _apply(weights: Any, image: NDArray[np.float64], size_hw: tuple[int, int]) -> NDArray[np.float64]:
    if image.shape[0] != size_hw[0]:
        image = np.einsum("ij,jkc->ikc", weights(image.shape[0], size_hw[0]), image, optimize=True)
    if image.shape[1] != size_hw[1]:
        image = np.einsum("ij,kjc->kic", weights(image.shape[1], size_hw[1]), image, optimize=True)
    return image
