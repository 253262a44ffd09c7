"""What an archive consists of: folders and globs of images, tar shards and Parquet files, here or at any fsspec URL."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from meliad_edge.data.images import IMAGE_SUFFIXES
from meliad_edge.errors import DataError

Kind = Literal["file", "tar", "parquet", "unreadable"]

KINDS: tuple[Kind, ...] = get_args(Kind)
UNIT_IMAGES = 256

_GLOB_CHARACTERS = frozenset("*?[")
_SHARD_SUFFIXES = frozenset({".tar", ".parquet"})
# Where one binary column must be told from others: Hugging Face's name, then those that are common.
_IMAGE_COLUMNS = ("image", "img", "bytes", "content", "jpg", "png")


@dataclass(frozen=True, slots=True)
class Item:
    """One image of an archive, where it lies; not read.

    Attributes:
        id: Unique in the archive: its path below the archive; of a shard's image, the shard's path, then ``/`` and the
            member's name in a tar, ``#`` and the row in a Parquet file.
        kind: How it is read; ``"unreadable"`` stands for a shard, or the rest of one, that is damaged.
        file: Path on the file system of the archive.
        first: First byte in a tar, row in a Parquet file.
        size: Bytes; -1 where a Parquet file does not say.
        problem: Why it is unreadable, else empty.
    """

    id: str
    kind: Kind
    file: str
    first: int = 0
    size: int = -1
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Archive:
    """Where images are.

    Attributes:
        url: As it was given: a path or URL of a folder, a file, or a glob.
        files: Its file system.
        root: The folder that ids count from.
        path: What was given, without its protocol.
    """

    url: str
    files: Any
    root: str
    path: str

    @classmethod
    def open(cls, url: str) -> Archive:
        """Find the file system of an archive; nothing is listed.

        Raises:
            DataError: Nobody knows the protocol, or its package is not installed.
        """
        try:
            files, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            msg = f"{url}: {error}; give a path or a URL that fsspec knows, and install what it asks for"
            raise DataError(msg) from error
        parts = PurePosixPath(path).parts
        plain = list(takewhile(_GLOB_CHARACTERS.isdisjoint, parts))
        if len(plain) < len(parts):
            return cls(url, files, str(PurePosixPath(*plain)), path)
        return cls(url, files, path if files.isdir(path) else str(PurePosixPath(path).parent), path)

    def units(self) -> Iterator[list[Item]]:
        """The images in units of work, none empty, in the order of their paths.

        A unit is at most 256 images of files or of one tar shard, or one row group of a Parquet file. Memory holds the
        names of one folder and one unit.

        Raises:
            DataError: There is nothing, or it cannot be listed.
        """
        try:
            plain: list[Item] = []
            for path, size in self._walk():
                suffix = PurePosixPath(path).suffix.lower()
                if suffix not in _SHARD_SUFFIXES:
                    plain.append(Item(self._id(path), "file", path, size=size))
                    if len(plain) == UNIT_IMAGES:
                        yield plain
                        plain = []
                else:
                    yield from self._tar_units(path) if suffix == ".tar" else self._parquet_units(path)
            if plain:
                yield plain
        except OSError as error:
            msg = f"{self.url}: cannot be listed ({error}); check the address and its permissions"
            raise DataError(msg) from error

    def _walk(self) -> Iterator[tuple[str, int]]:
        """Path and bytes of every image file and shard."""
        if self.path != self.root or not self.files.isdir(self.path):
            found = self.files.glob(self.path, detail=True) if self._is_glob() else {self.path: self._info(self.path)}
            for path, info in sorted(found.items()):
                if info["type"] == "file" and (not self._is_glob() or _is_wanted(path)):
                    yield path, int(info.get("size") or 0)
            return
        folders = [self.path]
        visited: set[str] = set()
        while folders:
            folder = folders.pop()
            if is_local(self.files):  # where links may lead back up
                real = os.path.realpath(folder)
                if real in visited:
                    continue
                visited.add(real)
            below = []
            for info in sorted(self.files.ls(folder, detail=True), key=lambda info: str(info["name"])):
                path = str(info["name"]).rstrip("/")
                if PurePosixPath(path).name.startswith("."):
                    continue
                if info["type"] == "directory" or (info.get("islink") and self.files.isdir(path)):
                    below.append(path)
                elif _is_wanted(path) and (info["type"] == "file" or (info.get("islink") and self.files.isfile(path))):
                    yield path, int(info.get("size") or 0)
            folders += reversed(below)

    def _is_glob(self) -> bool:
        return not _GLOB_CHARACTERS.isdisjoint(self.path)

    def _info(self, path: str) -> dict[str, Any]:
        try:
            info: dict[str, Any] = self.files.info(path)
        except FileNotFoundError as error:
            msg = f"{self.url} does not exist; give an image, a shard, a folder or a quoted glob pattern"
            raise DataError(msg) from error
        return info

    def _id(self, path: str) -> str:
        return path.removeprefix(self.root).lstrip("/") or PurePosixPath(path).name

    def _tar_units(self, path: str) -> Iterator[list[Item]]:
        members = self._tar_items(path)
        while unit := list(islice(members, UNIT_IMAGES)):
            yield unit

    def _tar_items(self, path: str) -> Iterator[Item]:
        seen: dict[str, int] = {}
        shard = self._id(path)
        try:
            with self.files.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if not member.isreg() or not _is_image(member.name):
                        continue
                    seen[member.name] = again = seen.get(member.name, 0) + 1
                    name = f"{shard}/{member.name}" + (f" ({again})" if again > 1 else "")
                    yield Item(name, "tar", path, member.offset_data, member.size)
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    msg = "cut off: the mark of its end is missing; what came before is scored"
                    yield Item(shard, "unreadable", path, problem=msg)
        except (tarfile.TarError, OSError) as error:
            msg = f"no plain tar, or damaged ({error}); what came before is scored"
            yield Item(shard, "unreadable", path, problem=msg)

    def _parquet_units(self, path: str) -> Iterator[list[Item]]:
        shard = self._id(path)
        try:
            with self.files.open(path, "rb") as file:
                parquet = pq.ParquetFile(file)
                image_column(parquet.schema_arrow)
                counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        except (pa.ArrowException, OSError, DataError) as error:
            yield [Item(shard, "unreadable", path, problem=f"no Parquet file of images ({error})")]
            return
        first = 0
        for count in counts:
            if count:
                yield [Item(f"{shard}#{row}", "parquet", path, row) for row in range(first, first + count)]
            first += count


def image_column(schema: pa.Schema) -> tuple[str, bool]:
    """The column that holds encoded images, and whether it is Hugging Face's struct of bytes and path.

    Raises:
        DataError: There is none, or several and none has a usual name.
    """
    found = {}
    for column in schema:
        kind = column.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            found[column.name] = False
        elif pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            found[column.name] = True
    named = [name for name in _IMAGE_COLUMNS if name in found] or list(found)
    if not named or (len(found) > 1 and named[0] not in _IMAGE_COLUMNS):
        msg = f"its columns are {', '.join(schema.names)}; one of encoded images is needed, best named image"
        raise DataError(msg)
    return named[0], found[named[0]]


def is_local(files: Any) -> bool:
    """Whether a file system is this machine's own."""
    return isinstance(files, LocalFileSystem)


def _is_wanted(path: str) -> bool:
    return _is_image(path) or PurePosixPath(path).suffix.lower() in _SHARD_SUFFIXES


def _is_image(path: str) -> bool:
    name = PurePosixPath(path)
    return name.suffix.lower() in IMAGE_SUFFIXES and not name.name.startswith(".")
