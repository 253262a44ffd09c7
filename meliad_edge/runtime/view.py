"""Which part of a camera's picture is judged, and in how many pieces: for parts much smaller than the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.errors import UsageError

_Number = TypeVar("_Number", bound=np.generic)
# A cell counts as masked when this share of it is.
_MASKED_SHARE = 0.5


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What of a frame is judged; by default all of it at once.

    Attributes:
        region: The rectangle that is looked at; None is the whole frame.
        tiles: Rows and columns into which it is cut; each tile is scored at the full size of the model's input, so a
            defect is that much larger in it, and a frame costs that many times the time.
        ignored: uint8 [H, W] of the frame's size: where it is not 0, cells of the map do not count.
    """

    region: Box | None = None
    tiles: tuple[int, int] = (1, 1)
    ignored: NDArray[np.uint8] | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.tiles[0] * self.tiles[1]

    def area(self, image_hw: tuple[int, int]) -> Box:
        """The rectangle that is judged.

        Raises:
            UsageError: It does not lie in a frame of this size, or the mask has another size.
        """
        height, width = image_hw
        box = self.region or Box(0, 0, width, height)
        if box.x < 0 or box.y < 0 or box.x + box.width > width or box.y + box.height > height:
            msg = f"region {','.join(map(str, box))} does not lie in the picture, which is {width}x{height}; move it"
            raise UsageError(msg)
        if self.ignored is not None and self.ignored.shape != (height, width):
            rows, columns = self.ignored.shape
            msg = f"the mask is {columns}x{rows}, the picture {width}x{height}; draw it on a picture of the camera"
            raise UsageError(msg)
        if box.height < self.tiles[0] or box.width < self.tiles[1]:
            msg = f"{self.tiles[0]}x{self.tiles[1]} tiles do not fit into {box.width}x{box.height} pixels"
            raise UsageError(msg)
        return box

    def cut(self, image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """The tiles of an image [H, W, 3], row by row; views, not copies."""
        box = self.area((image.shape[0], image.shape[1]))
        rows, columns = self.tiles
        y = [box.y + box.height * row // rows for row in range(rows + 1)]
        x = [box.x + box.width * column // columns for column in range(columns + 1)]
        return [
            image[top:bottom, left:right]
            for top, bottom in zip(y, y[1:], strict=False)
            for left, right in zip(x, x[1:], strict=False)
        ]

    def join(self, planes: Sequence[NDArray[_Number]]) -> NDArray[_Number]:
        """Put the planes of the tiles, each [..., h, w], together as the tiles lie: [..., rows * h, columns * w]."""
        rows, columns = self.tiles
        if rows == columns == 1:
            return planes[0]
        lines = [np.concatenate(planes[row * columns : (row + 1) * columns], axis=-1) for row in range(rows)]
        return np.concatenate(lines, axis=-2)

    def ignored_cells(self, image_hw: tuple[int, int], grid_hw: tuple[int, int]) -> NDArray[np.bool_] | None:
        """Cells [h, w] of the joined map that do not count, or None when all do.

        Raises:
            UsageError: The mask covers every cell.
        """
        if self.ignored is None:
            return None
        x, y, width, height = self.area(image_hw)
        covered = (self.ignored[y : y + height, x : x + width] != 0).astype(np.float32)
        cells = cv2.resize(covered, grid_hw[::-1], interpolation=cv2.INTER_AREA) >= _MASKED_SHARE
        if cells.all():
            msg = "the mask covers all that is looked at; leave something free"
            raise UsageError(msg)
        return np.asarray(cells)


WHOLE = View()
