"""The training patches behind the prototypes: what a cell was compared with, in pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

EXEMPLAR_SIZE = 48
_TILES_PER_ROW = 32


@dataclass(frozen=True, slots=True)
class Exemplar:
    """The training patch that stands for one prototype.

    Attributes:
        defect: ``"good"`` or the defect class of the image it came from.
        source: File name of that image.
        x, y, width, height: The patch, in pixels of the image at model size.
        patch: uint8 [48, 48, 3], RGB.
    """

    defect: str
    source: str
    x: int
    y: int
    width: int
    height: int
    patch: NDArray[np.uint8]


class _ExemplarRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    defect: str
    source: str
    x: int
    y: int
    width: int
    height: int


def cut_exemplar(
    frame: NDArray[np.uint8], cell: tuple[int, int], grid_hw: tuple[int, int], defect: str, source: str
) -> Exemplar:
    """Cut the patch around one grid cell: the cell and its neighbours, which the pooled feature describes.

    Args:
        frame: uint8 [H, W, 3] at model size.
        cell: Row and column in the grid.
        grid_hw: Rows and columns of the grid.
        defect: Class of the image.
        source: File name of the image.
    """
    cell_h, cell_w = frame.shape[0] // grid_hw[0], frame.shape[1] // grid_hw[1]
    width, height = min(3 * cell_w, frame.shape[1]), min(3 * cell_h, frame.shape[0])
    x = int(np.clip((cell[1] - 1) * cell_w, 0, frame.shape[1] - width))
    y = int(np.clip((cell[0] - 1) * cell_h, 0, frame.shape[0] - height))
    patch = cv2.resize(
        frame[y : y + height, x : x + width], (EXEMPLAR_SIZE, EXEMPLAR_SIZE), interpolation=cv2.INTER_AREA
    )
    return Exemplar(defect, source, x, y, width, height, np.asarray(patch, dtype=np.uint8))


def to_fields(exemplars: Sequence[Exemplar]) -> list[dict[str, Any]]:
    """Everything but the pictures, ready for JSON."""
    names = [name for name in Exemplar.__slots__ if name != "patch"]
    return [{name: getattr(exemplar, name) for name in names} for exemplar in exemplars]


def to_contact_sheet(exemplars: Sequence[Exemplar]) -> NDArray[np.uint8]:
    """All pictures as one RGB image, 32 to a row."""
    rows = -(-len(exemplars) // _TILES_PER_ROW)
    sheet = np.zeros((rows * EXEMPLAR_SIZE, _TILES_PER_ROW * EXEMPLAR_SIZE, 3), np.uint8)
    for index, exemplar in enumerate(exemplars):
        _tile(sheet, index)[:] = exemplar.patch
    return sheet


def from_fields(fields: Sequence[dict[str, Any]], sheet: NDArray[np.uint8]) -> tuple[Exemplar, ...]:
    """The inverse of :func:`to_fields` and :func:`to_contact_sheet`.

    Raises:
        ValueError: The sheet is too small for that many exemplars, or fields are missing, unknown or of another type.
    """
    rows = -(-len(fields) // _TILES_PER_ROW)
    if sheet.shape[0] < rows * EXEMPLAR_SIZE or sheet.shape[1] < _TILES_PER_ROW * EXEMPLAR_SIZE:
        msg = f"contact sheet of {sheet.shape[1]} x {sheet.shape[0]} pixels is too small for {len(fields)} exemplars"
        raise ValueError(msg)
    records = [_ExemplarRecord.model_validate(values) for values in fields]
    return tuple(Exemplar(**dict(record), patch=_tile(sheet, index)) for index, record in enumerate(records))


def _tile(sheet: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
    top, left = (index // _TILES_PER_ROW) * EXEMPLAR_SIZE, (index % _TILES_PER_ROW) * EXEMPLAR_SIZE
    return sheet[top : top + EXEMPLAR_SIZE, left : left + EXEMPLAR_SIZE]
