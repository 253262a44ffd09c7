"""Images of a unit, read and decoded a few ahead of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meliad_edge.archive.items import Item, image_column, reason, stamp
from meliad_edge.data.images import decode_image
from meliad_edge.errors import ImageError

Picture = NDArray[np.uint8]

_MAX_IMAGE_BYTES = 1_000_000_000
_AHEAD = 8
_READERS = 4
_PARQUET_ROWS = 16
_PARQUET_BUFFER = 1 << 16


def read_unit(files: Any, unit: Sequence[Item]) -> Iterator[tuple[Item, Picture | ImageError]]:
    """Every item of a unit with its image, RGB uint8 [H, W, 3], or why it has none; in order.

    Args:
        files: The file system of the archive.
        unit: Items as :meth:`~meliad_edge.archive.items.Archive.units` gives them, or some of one unit.
    """
    encoded: Iterator[tuple[Item, bytes | ImageError | None]]
    if problem := _problem_of_shard(files, unit[0]):
        encoded = ((item, ImageError(f"cannot read image {item.id}: {problem}")) for item in unit)
    else:
        encoded = _read_parquet(files, unit) if unit[0].kind == "parquet" else zip(unit, repeat(None))  # noqa: B905
    with ThreadPoolExecutor(_READERS, thread_name_prefix="archive") as pool:
        waiting: deque[tuple[Item, Future[Picture]]] = deque()
        for item, data in encoded:
            waiting.append((item, pool.submit(_load, files, item, data)))
            if len(waiting) >= _AHEAD:
                yield _take(*waiting.popleft())
        while waiting:
            yield _take(*waiting.popleft())


def _take(item: Item, picture: Future[Picture]) -> tuple[Item, Picture | ImageError]:
    try:
        return item, picture.result()
    except ImageError as error:
        return item, error


def _load(files: Any, item: Item, data: bytes | ImageError | None) -> Picture:
    if item.problem:
        raise ImageError(f"cannot read {item.id}: {item.problem}")
    if isinstance(data, ImageError):
        raise data
    if item.size > _MAX_IMAGE_BYTES:
        raise ImageError(f"cannot read image {item.id}: {item.size:,} bytes, at most {_MAX_IMAGE_BYTES:,} are read")
    return decode_image(_fetch(files, item) if data is None else data, item.id)


def _fetch(files: Any, item: Item) -> bytes:
    span = {"start": item.first, "end": item.first + item.size} if item.kind == "tar" else {}
    try:
        return bytes(files.cat_file(item.file, **span))
    except Exception as error:  # each file system has errors of its own
        raise ImageError(f"cannot read image {item.id}: {reason(error)}; check that it is still there") from error


def _problem_of_shard(files: Any, item: Item) -> str:
    """Why a shard is not what was listed, or nothing; rows and offsets of another file belong to other pictures."""
    if not item.stamp:
        return ""
    try:
        files.invalidate_cache(item.file)
        now = stamp(files.info(item.file))
    except Exception as error:  # each file system has errors of its own
        return f"{reason(error)}; check that it is still there"
    return "" if now == item.stamp else "its shard changed since it was listed; score it again into another folder"


def _read_parquet(files: Any, unit: Sequence[Item]) -> Iterator[tuple[Item, bytes | ImageError]]:
    """Rows of one row group, or some of them, without holding all of it."""
    rest = deque(unit)
    try:
        with files.open(unit[0].file, "rb") as file:
            # With a buffer it is read page by page; else the whole row group, which may be larger than the memory.
            parquet = pq.ParquetFile(file, buffer_size=_PARQUET_BUFFER)
            name, is_struct = image_column(parquet.schema_arrow)
            group, first = _find_group(parquet, unit[0].first)
            for batch in parquet.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[name]):
                values = batch.column(0).field("bytes") if is_struct else batch.column(0)
                for row, value in enumerate(values, first):
                    if rest[0].first == row:
                        data = value.as_py()
                        item = rest.popleft()
                        empty = ImageError(f"cannot read image {item.id}: the row is empty")
                        yield item, empty if data is None else data
                        if not rest:
                            return
                first += batch.num_rows
        problem = "the file no longer has this row; it changed since it was listed"
    except Exception as error:  # each file system has errors of its own, and so has a damaged file
        problem = f"the Parquet file is damaged or was changed ({reason(error)})"
    for item in rest:
        yield item, ImageError(f"cannot read image {item.id}: {problem}")


def _find_group(parquet: pq.ParquetFile, row: int) -> tuple[int, int]:
    """The row group that holds a row, and its first row."""
    first = 0
    for group in range(parquet.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        if row < first + count:
            return group, first
        first += count
    raise pa.ArrowInvalid(f"there is no row {row}")
