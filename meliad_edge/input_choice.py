"""The size of the model's input, chosen from the training images and the budget alone [ours]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meliad_edge.config import FitConfig
from meliad_edge.data.dataset import Sample
from meliad_edge.data.images import read_image_size
from meliad_edge.data.input_size import BASE_AREA, common_aspect_ratio, in_words, largest_size
from meliad_edge.errors import ImageError

_HEADERS = 200


@dataclass(frozen=True, slots=True)
class InputSize:
    """The size of the model's input.

    Attributes:
        size_hw: Height and width in pixels, multiples of 32.
        reason: Where it comes from, to follow the size in a sentence.
    """

    size_hw: tuple[int, int]
    reason: str

    def __str__(self) -> str:
        """Width, height and reason, for reports."""
        return f"{in_words(self.size_hw)} pixels, {self.reason}"


def choose_input_size(config: FitConfig, normals: Sequence[Sample]) -> InputSize:
    """Take the size that was set, or else the largest that the images have the pixels for and the budget allows.

    Args:
        config: Settings.
        normals: Training images. Only the headers of some are read; a file that cannot be read does not count.
    """
    if config.image_size is not None:
        return InputSize((config.image_size, config.image_size), "as set")
    order = np.random.default_rng(config.seed).permutation(len(normals))
    image_sizes = _image_sizes([normals[index] for index in order[:_HEADERS]])
    size_hw = largest_size(image_sizes, config.budget)
    shape = "square, the images differ in aspect ratio"
    if common_aspect_ratio(image_sizes) is not None:
        shape = "close to the images' aspect ratio"
    if size_hw == largest_size(image_sizes, 1.0):
        return InputSize(size_hw, shape)
    times = round(size_hw[0] * size_hw[1] / BASE_AREA)
    return InputSize(size_hw, f"{shape}; {times} times the usual area, which the images fill and --budget allows")


def _image_sizes(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """Heights and widths; a file that cannot be read is reported when it is to be decoded."""
    sizes = []
    for sample in samples:
        try:
            sizes.append(read_image_size(sample.path))
        except ImageError:
            continue
    return sizes
