"""Sharpness as the width of edges: a figure in pixels that neither light nor what a part looks like changes much."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

# Blocks at most, and their side in pixels: edges wider than that are no edges any more. The first and the last row are
# not looked at: letters that a camera writes there stay sharp.
_ROWS, _COLUMNS, _SIDE = 9, 16, 32
# A block with less contrast has no edge: noise of a standard deviation of 5 stays below.
_EDGE_CONTRAST = 48
# Edges that are looked at: of the blocks with the most contrast, the sharpest.
_FEWEST_BLOCKS, _CONTRASTY, _SHARPEST = 3, 16, 0.25
# Beyond the widest edges that the camera showed at first, and beyond the usual ones see ``blurred_ratio``.
_BEYOND_WIDEST = 1.25


def edge_width_px(image: NDArray[np.uint8]) -> float | None:
    """Width of the sharpest edges: contrast of a block over its steepest step from one pixel to the next.

    An ideal step blurred by a Gaussian of standard deviation s pixels has width 2.5 s.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        Pixels, at least 1; None where there is hardly an edge, and of pictures lower than 96 pixels.
    """
    height, width = image.shape[:2]
    rows, columns = min(_ROWS, height // _SIDE), min(_COLUMNS, width // _SIDE)
    if rows < 3 or columns == 0:
        return None
    down, across = height // rows, width // columns
    grid = image[: rows * down, : columns * across, 1].reshape(rows, down, columns, across)
    blocks = np.ascontiguousarray(grid[1:-1, :_SIDE, :, :_SIDE].transpose(0, 2, 1, 3)).reshape(-1, _SIDE, _SIDE)
    contrast = blocks.max(axis=(1, 2)) - blocks.min(axis=(1, 2))
    chosen = np.argsort(contrast)[-_CONTRASTY:]
    chosen = chosen[contrast[chosen] >= _EDGE_CONTRAST]
    if len(chosen) < _FEWEST_BLOCKS:
        return None
    edged = blocks[chosen]
    steepest = np.maximum(_steepest(edged[:, 1:], edged[:, :-1]), _steepest(edged[:, :, 1:], edged[:, :, :-1]))
    return float(np.quantile(contrast[chosen] / steepest, _SHARPEST))


class SharpnessMonitor:
    """Edges against those that the same camera showed first.

    Args:
        learning_looks: Pictures with edges from which the usual width is learned.
        deciding_looks: Pictures with edges that must agree.
        blurred_ratio: Edges so many times as wide as usual are blurred.
    """

    def __init__(self, learning_looks: int, deciding_looks: int, blurred_ratio: float) -> None:
        self._learning_looks = learning_looks
        self._blurred_ratio = blurred_ratio
        self._learned: list[float] = []
        self._recent: deque[float] = deque(maxlen=deciding_looks)
        self._usual_px = self._limit_px = 0.0

    def update(self, image: NDArray[np.uint8]) -> str:
        """Take in a picture; returns the figures while the latest are blurred, ``""`` otherwise."""
        width_px = edge_width_px(image)
        if width_px is not None:
            if len(self._learned) < self._learning_looks:
                self._learn(width_px)
            else:
                self._recent.append(width_px)
        if self._recent.maxlen != len(self._recent) or min(self._recent) < self._limit_px:
            return ""
        return f"edges are {min(self._recent):.1f} pixels wide, at first they were {self._usual_px:.1f}"

    def _learn(self, width_px: float) -> None:
        self._learned.append(width_px)
        self._usual_px = float(np.median(self._learned))
        # Pictures that were blurred while it was learned, as by a passing hand, must not set the limit.
        widest_px = float(np.quantile(self._learned, 0.75))
        self._limit_px = max(self._blurred_ratio * self._usual_px, _BEYOND_WIDEST * widest_px)


def _steepest(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Largest absolute difference per block; of at least one level, so that it can be divided by."""
    steps = np.maximum(first, second) - np.minimum(first, second)
    return np.asarray(np.maximum(steps.max(axis=(1, 2)), 1), dtype=np.uint8)
