"""The folder of a result: what was listed, one Parquet file per finished unit, and what makes it go on after a stop.

    OUT/run.json                     archive and model; another one is refused
    OUT/items.parquet                every image, a row group per unit; there whole or not at all
    OUT/results/unit-00000000.parquet  decisions of one unit; there whole or not at all
    OUT/summary.json, errors.csv, worst.html, worst/  written at the end, from the results alone

A unit has one file with one name, whoever scores it and however often: so each image is in the result exactly once.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from meliad_edge.archive.items import KINDS, Archive, Item, is_local
from meliad_edge.errors import DataError, UsageError

_ITEMS = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("file", pa.binary()),  # a file name need not be UTF-8
        ("first", pa.int64()),
        ("size", pa.int64()),
        ("stamp", pa.string()),
        ("problem", pa.string()),
    ]
)
_PAUSES_S = (0.5, 2.0, 8.0)


@dataclass(frozen=True, slots=True)
class ResultFolder:
    """Where a result is, on any fsspec file system that every worker reaches.

    Attributes:
        url: As it was given.
        files: Its file system.
        path: On that.
    """

    url: str
    files: Any
    path: str

    @classmethod
    def open(cls, url: str) -> ResultFolder:
        """Find its file system; nothing is made.

        Raises:
            UsageError: Nobody knows the protocol, or its package is not installed.
        """
        try:
            files, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            msg = f"--out {url}: {error}; give a folder or a URL that fsspec knows, and install what it asks for"
            raise UsageError(msg) from error
        return cls(url, files, path)

    def at(self, name: str) -> str:
        """Path of something in it."""
        return str(PurePosixPath(self.path, name))

    def write(self, name: str, data: bytes) -> None:
        """Write a file that is there whole or not at all."""
        path = self.at(name)
        if not is_local(self.files):
            self.files.pipe_file(path, data)  # object stores show an object when it is complete
            return
        partial = Path(_partial(path))
        partial.write_bytes(data)
        partial.replace(path)

    def read(self, name: str) -> bytes | None:
        """A whole file; None where there is none."""
        try:
            data: bytes = self.files.cat_file(self.at(name))
        except FileNotFoundError:
            return None
        return data

    def begin(self, archive: Archive, run: dict[str, Any]) -> None:
        """Note what is scored with what, and write down every image; memory holds a unit at a time.

        What was written down before stays.

        Raises:
            UsageError: The folder belongs to another archive or model.
            DataError: There is no image; the folder then still belongs to none.
        """
        for name, value in json.loads(self.read("run.json") or b"{}").items():
            if run.get(name) != value:
                msg = f"--out {self.url} holds a result with {name} {value}, not {run.get(name)}; name another folder"
                raise UsageError(msg)
        self.files.makedirs(self.at("results"), exist_ok=True)
        path = self.at("items.parquet")
        if self.files.exists(path):
            return
        partial, count = _partial(path), 0
        try:
            with self.files.open(partial, "wb") as file, pq.ParquetWriter(file, _ITEMS) as writer:
                for unit in archive.units():
                    columns = {name: [getattr(item, name) for item in unit] for name in _ITEMS.names}
                    columns["file"] = [item.file.encode(errors="surrogateescape") for item in unit]
                    writer.write_table(pa.table(columns, schema=_ITEMS), row_group_size=len(unit))
                    count += len(unit)
            if not count:
                msg = f"{archive.url}: no images in it; images, .tar shards and .parquet files are looked for"
                raise DataError(msg)
            self.write("run.json", json.dumps(run, indent=1).encode() + b"\n")
            self.files.mv(partial, path)
        except BaseException:
            if self.files.exists(partial):
                self.files.rm_file(partial)
            raise

    def sizes(self) -> list[int]:
        """Images of each unit."""
        with self.files.open(self.at("items.parquet"), "rb") as file:
            metadata = pq.ParquetFile(file).metadata
            return [metadata.row_group(unit).num_rows for unit in range(metadata.num_row_groups)]

    def read_unit(self, unit: int) -> list[Item]:
        """The items of a unit."""
        with self.files.open(self.at("items.parquet"), "rb") as file:
            rows = pq.ParquetFile(file).read_row_group(unit).to_pylist()
        known = {str(kind): kind for kind in KINDS}
        return [
            Item(**{**row, "kind": known[row["kind"]], "file": row["file"].decode(errors="surrogateescape")})
            for row in rows
        ]

    def finished(self) -> set[int]:
        """Units that have a result."""
        self.files.invalidate_cache()
        try:
            paths = self.files.ls(self.at("results"), detail=False)
        except FileNotFoundError:  # an object store has no empty folders
            return set()
        names = (PurePosixPath(path).name for path in paths)
        return {int(name[5:-8]) for name in names if name.startswith("unit-") and name.endswith(".parquet")}

    def write_result(self, unit: int, table: pa.Table) -> None:
        """Keep the decisions of a unit; a place that fails is tried a few times more.

        Raises:
            OSError: It fails every time.
        """
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        data = buffer.getvalue().to_pybytes()
        for pause_s in _PAUSES_S:
            try:
                self.write(_result_name(unit), data)
            except OSError:
                time.sleep(pause_s)
            else:
                return
        self.write(_result_name(unit), data)

    def results(self, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
        """Unit after unit, some columns of its decisions."""
        for unit in sorted(self.finished()):
            with self.files.open(self.at(_result_name(unit)), "rb") as file:
                yield unit, pq.ParquetFile(file).read(columns=columns)


def _result_name(unit: int) -> str:
    return f"results/unit-{unit:08d}.parquet"


def _partial(path: str) -> str:
    place = PurePosixPath(path)
    # With a dot: whoever reads the results as one table overlooks what a killed process left behind.
    return str(place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.partial"))
