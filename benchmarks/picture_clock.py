"""A clock in the picture: milliseconds as black and white blocks, so that whoever has the picture knows its age."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_COLUMNS, _BITS = 16, 32


def draw_clock(strip: NDArray[np.uint8], milliseconds: int) -> None:
    """Fill a strip, uint8 [H, W, 3]: 32 bits in two rows of blocks, below them the same inverted, against damage."""
    value = np.array([milliseconds >> (_BITS - 1 - bit) & 1 for bit in range(_BITS)], np.uint8).reshape(2, _COLUMNS)
    rows, columns = _edges(strip.shape[0], 4), _edges(strip.shape[1], _COLUMNS)
    for row, bits in enumerate(np.concatenate([value, 1 - value])):
        for column, bit in enumerate(bits):
            strip[rows[row] : rows[row + 1], columns[column] : columns[column + 1]] = 235 if bit else 16


def read_clock(strip: NDArray[np.uint8]) -> int | None:
    """The milliseconds modulo 2^32 that a strip [H, W, 3] shows; None when it is damaged."""
    rows, columns = _edges(strip.shape[0], 4), _edges(strip.shape[1], _COLUMNS)
    middle_rows = [(top + bottom) // 2 for top, bottom in zip(rows, rows[1:], strict=False)]
    middle_columns = [(left + right) // 2 for left, right in zip(columns, columns[1:], strict=False)]
    bits = strip[np.ix_(middle_rows, middle_columns)][..., 1] > 128
    value, inverted = bits[:2].ravel(), bits[2:].ravel()
    if (value == inverted).any():
        return None
    return int("".join("1" if bit else "0" for bit in value), 2)


def _edges(length: int, parts: int) -> list[int]:
    return [length * part // parts for part in range(parts + 1)]


def age_s(strip: NDArray[np.uint8], now_s: float) -> float | None:
    """Seconds since the picture was made, on the monotonic clock of the same machine; None when it is damaged."""
    shown_ms = read_clock(strip)
    return None if shown_ms is None else 1e-3 * ((round(1000 * now_s) - shown_ms) % 2**_BITS)
