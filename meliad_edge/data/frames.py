"""Samples to model input: many images decoded and resized, the unreadable ones set aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meliad_edge.data.dataset import Sample
from meliad_edge.data.images import read_image
from meliad_edge.data.preprocess import to_model_input
from meliad_edge.errors import DataError, ImageError
from meliad_edge.progress import track


@dataclass(frozen=True, slots=True)
class LoadedFrames:
    """Images at model size.

    Attributes:
        frames: uint8 RGB [n, H, W, 3].
        samples: The n samples they came from, in the same order.
        errors: One message for each sample that could not be read.
    """

    frames: NDArray[np.uint8]
    samples: tuple[Sample, ...]
    errors: tuple[str, ...]


def load_frames(samples: Sequence[Sample], size_hw: tuple[int, int], description: str) -> LoadedFrames:
    """Decode and resize samples; a bad file is reported and the rest goes on.

    Args:
        samples: What to read.
        size_hw: Model input size in pixels.
        description: Label of the progress bar.

    Raises:
        DataError: There were samples and not one of them could be read.
    """
    frames = np.empty((len(samples), *size_hw, 3), np.uint8)
    read: list[Sample] = []
    errors: list[str] = []
    for sample in track(samples, description):
        try:
            frames[len(read)] = to_model_input(read_image(sample.path), size_hw)
        except ImageError as error:
            errors.append(str(error))
        else:
            read.append(sample)
    if samples and not read:
        msg = f"none of {len(samples)} images can be read; the first: {errors[0]}"
        raise DataError(msg)
    return LoadedFrames(frames[: len(read)], tuple(read), tuple(errors))
