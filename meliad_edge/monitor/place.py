"""Whether a camera still looks where it looked at first, by what stands still in its picture.

Parts move and belts run, so only blocks that looked alike throughout the first minute count, and of these only such as
are like no other place near by: along a straight rail nothing can be placed. Each is searched for around its old place.
The picture has moved only if nearly all that are found agree on one shift, turn and scale: a part that covers some
hides them, and a belt that stopped elsewhere contradicts the frame around it. What a camera writes into its picture
stays where it is, and contradicts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_WIDTH = 320
_BLOCK, _STEP = 32, 16
_REACH = 32  # Farthest shift of a block that is searched for, a tenth of the width.
_PARTS = 3  # Parts of the first minute in each of which a block must look alike.
_TEXTURE = 1.0  # Least standard deviation of a block's fine structure, in levels of 255.
_ALIKE = 0.7  # Correlation from which a place is taken for a block.
_SELF_PX = 5  # A block is like the places this close to it.
# Correlation up to which another place may be like a block, and how much less than the best one it must be when found.
_NOT_ALIKE, _CLEARLY = 0.85, 0.1
_CLOSE_PX = 1.5  # A block this close to where a movement takes it agrees with it.
_FEWEST_BLOCKS = 6
_AGREEING = 0.8  # Share of the blocks found.
_AT_HOME = 0.9  # Share of all blocks; then there is nothing to search for.
_CAPTION = 0.08  # Share of the height, at the top and at the bottom, where cameras write the date and their name.


@dataclass(frozen=True, slots=True)
class Movement:
    """How the picture moved.

    Attributes:
        share: Largest displacement of a corner over the width of the picture.
        turn_deg: Rotation of the picture in degrees, clockwise.
    """

    share: float
    turn_deg: float


_NONE = Movement(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the still background is.

    Attributes:
        found_share: Share of its blocks that are found, at home or elsewhere.
        movement: What they agree on; None when they do not, or are too few.
    """

    found_share: float
    movement: Movement | None


class PlaceMonitor:
    """The still background against where it was at first.

    Args:
        learning_looks: Pictures from which the background is learned.
        deciding_looks: Pictures that are put together to one without moving parts.
    """

    def __init__(self, learning_looks: int, deciding_looks: int) -> None:
        self._learning_looks = learning_looks
        self._deciding_looks = deciding_looks
        self._pictures: list[NDArray[np.uint8]] = []
        self._background: _Background | None = None
        self._place: Place | None = None

    def update(self, image: NDArray[np.uint8]) -> Place | None:
        """Take in a picture.

        Args:
            image: uint8 [H, W, 3], of the same size every time.

        Returns:
            What was found in the latest pictures that were put together; None before, and where too little stands
            still.
        """
        self._pictures.append(_small(image))
        if self._background is None:
            if len(self._pictures) == self._learning_looks:
                self._background = _Background.learn(self._pictures)
                self._pictures.clear()
        elif len(self._pictures) == self._deciding_looks:
            if len(self._background.corners) >= _FEWEST_BLOCKS:
                self._place = self._background.find(_structure(_median(self._pictures)))
            self._pictures.clear()
        return self._place


@dataclass(frozen=True, slots=True, eq=False)
class _Background:
    """Blocks that stand still.

    Attributes:
        corners: int64 [n, 2], left and top of each.
        blocks: float32 [n, 32, 32], their fine structure.
    """

    corners: NDArray[np.int64]
    blocks: NDArray[np.float32]

    @classmethod
    def learn(cls, pictures: Sequence[NDArray[np.uint8]]) -> _Background:
        """Those that look alike in each part of the first pictures; a median has no passing parts."""
        height, width = pictures[0].shape
        corners = np.array(
            [(x, y) for y in range(0, height - _BLOCK + 1, _STEP) for x in range(0, width - _BLOCK + 1, _STEP)],
            dtype=np.int64,
        ).reshape(-1, 2)
        whole = _structure(_median(pictures))
        blocks = _cut(whole, corners)
        is_good = blocks.std(axis=(1, 2)) >= _TEXTURE
        bounds = np.linspace(0, len(pictures), _PARTS + 1).astype(int)
        for first, end in zip(bounds[:-1], bounds[1:], strict=True):
            is_good &= _correlate(_cut(_structure(_median(pictures[first:end])), corners), blocks) >= _ALIKE
        for index in np.flatnonzero(is_good):
            is_good[index] = _is_unique(whole, blocks[index], corners[index])
        return cls(corners[is_good], blocks[is_good])

    def find(self, structure: NDArray[np.float32]) -> Place:
        """Where it is in a picture."""
        at_home = float(np.mean(_correlate(_cut(structure, self.corners), self.blocks) >= _ALIKE))
        if at_home >= _AT_HOME:
            return Place(at_home, _NONE)
        places = [_find(structure, block, corner) for block, corner in zip(self.blocks, self.corners, strict=True)]
        is_found = np.array([place is not None for place in places])
        found_share = float(np.mean(is_found))
        before = self.corners[is_found] + 0.5 * _BLOCK
        after = np.array([place for place in places if place is not None]).reshape(-1, 2) + 0.5 * _BLOCK
        height, width = structure.shape
        from_edge = np.minimum(before[:, 1], height - before[:, 1]) - 0.5 * _BLOCK
        may_be_caption = (from_edge < _CAPTION * height) & (_distance(before, after) <= _CLOSE_PX)
        before, after = before[~may_be_caption], after[~may_be_caption]
        if len(before) < _FEWEST_BLOCKS:
            return Place(found_share, None)
        transform, _ = cv2.estimateAffinePartial2D(before, after, ransacReprojThreshold=_CLOSE_PX)
        if transform is None or np.mean(_distance(_apply(transform, before), after) <= _CLOSE_PX) < _AGREEING:
            return Place(found_share, None)
        frame = np.array([[0, 0], [width, 0], [0, height], [width, height]], dtype=np.float64)
        share = float(_distance(_apply(transform, frame), frame).max()) / width
        turn_deg = float(np.degrees(np.arctan2(transform[1, 0], transform[0, 0])))
        return Place(found_share, Movement(share, turn_deg))


def _small(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The green of a picture, 320 pixels wide."""
    height, width = image.shape[:2]
    step = max(1, width // (2 * _WIDTH))  # Averaging two pixels a side is enough, and takes half the time.
    size = _WIDTH, max(1, round(height * _WIDTH / width))
    return np.asarray(cv2.resize(image[::step, ::step, 1], size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _median(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    return np.asarray(np.median(np.stack(pictures), axis=0), dtype=np.float32)


def _structure(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fine structure alone: what is left between two blurs knows nothing of light, and little of noise."""
    fine = cv2.GaussianBlur(picture, (0, 0), 1.0) - cv2.GaussianBlur(picture, (0, 0), 3.0)
    return np.asarray(fine, dtype=np.float32)


def _cut(structure: NDArray[np.float32], corners: NDArray[np.int64]) -> NDArray[np.float32]:
    """Blocks at these corners, [n, 32, 32]."""
    blocks = [structure[y : y + _BLOCK, x : x + _BLOCK] for x, y in corners]
    return np.array(blocks, dtype=np.float32).reshape(-1, _BLOCK, _BLOCK)


def _correlate(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """Correlation coefficient block by block, [n]."""
    a = (first - first.mean(axis=(1, 2), keepdims=True)).reshape(-1, _BLOCK * _BLOCK)
    b = (second - second.mean(axis=(1, 2), keepdims=True)).reshape(-1, _BLOCK * _BLOCK)
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.asarray((a * b).sum(axis=1) / np.maximum(scale, 1e-9), dtype=np.float64)


def _search(
    structure: NDArray[np.float32], block: NDArray[np.float32], corner: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """How alike a block the places around its old one are, [h, w], and left and top of the first of them."""
    height, width = structure.shape
    left, top = np.maximum(0, corner - _REACH)
    right, bottom = np.minimum((width, height), corner + _BLOCK + _REACH)
    likeness = cv2.matchTemplate(structure[top:bottom, left:right], block, cv2.TM_CCOEFF_NORMED)
    return np.asarray(likeness, dtype=np.float32), np.array([left, top], dtype=np.int64)


def _find(
    structure: NDArray[np.float32], block: NDArray[np.float32], corner: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """Left and top of the place that is like a block; None where none is, or where several are."""
    likeness, first = _search(structure, block, corner)
    _, best, _, place = cv2.minMaxLoc(likeness)
    if best < _ALIKE or _second(likeness, *place) > best - _CLEARLY:
        return None
    return first + np.array(place, dtype=np.int64)


def _is_unique(structure: NDArray[np.float32], block: NDArray[np.float32], corner: NDArray[np.int64]) -> bool:
    """Whether a block is like no other place around it."""
    likeness, first = _search(structure, block, corner)
    x, y = corner - first
    return _second(likeness, int(x), int(y)) <= _NOT_ALIKE


def _second(likeness: NDArray[np.float32], x: int, y: int) -> float:
    """How alike the best place is that is not around this one."""
    elsewhere = likeness.copy()
    elsewhere[max(0, y - _SELF_PX) : y + _SELF_PX + 1, max(0, x - _SELF_PX) : x + _SELF_PX + 1] = -1.0
    return float(elsewhere.max())


def _apply(transform: NDArray[Any], points: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(points @ transform[:, :2].T + transform[:, 2], dtype=np.float64)


def _distance(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(first - second, axis=1), dtype=np.float64)
