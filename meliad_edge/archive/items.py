"""What an archive consists of: folders and globs of images, tar shards and Parquet files, here or at any fsspec URL."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
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
_EVERYTHING = ("**", "*")
_SHARD_SUFFIXES = frozenset({".tar", ".parquet"})
# Where one binary column must be told from others: Hugging Face's name, then those that are common.
_IMAGE_COLUMNS = ("image", "img", "bytes", "content", "jpg", "png")
# What file systems call the version of a file, or the time of its last change; the surest first.
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified")


@dataclass(frozen=True, slots=True)
class Item:
    """One image of an archive, where it lies; not read.

    Attributes:
        id: Unique in the archive: its path below the archive; of a shard's image, the shard's path, then ``/`` and the
            member's name in a tar, ``#`` and the row in a Parquet file. What cannot be printed is escaped.
        kind: How it is read; ``"unreadable"`` stands for a folder, a shard, the rest of one, or a link in it.
        file: Path on the file system of the archive.
        first: First byte in a tar, row in a Parquet file.
        size: Bytes; -1 where a Parquet file does not say.
        stamp: Of the shard when it was listed, see :func:`stamp`; empty for a file of its own.
        problem: Why it is unreadable, else empty.
    """

    id: str
    kind: Kind
    file: str
    first: int = 0
    size: int = -1
    stamp: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Archive:
    """Where images are.

    Attributes:
        url: As it was given: a path or URL of a folder, a file, or a glob.
        files: Its file system.
        root: The folder that ids count from.
        path: What was given, without its protocol.
        pattern: What is looked for below the root, part by part; empty for a file.
    """

    url: str
    files: Any
    root: str
    path: str
    pattern: tuple[str, ...]

    @classmethod
    def open(cls, url: str) -> Archive:
        """Find the file system of an archive; nothing is listed.

        Raises:
            DataError: Nobody knows the protocol, its package is not installed, or the place cannot be reached.
        """
        try:
            files, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            msg = f"{url}: {error}; give a path or a URL that fsspec knows, and install what it asks for"
            raise DataError(msg) from error
        parts = path.split("/")
        plain = list(takewhile(_GLOB_CHARACTERS.isdisjoint, parts))
        try:
            if files.isdir(path):
                return cls(url, files, path, path, _EVERYTHING)
            if len(plain) == len(parts) or files.exists(path):
                return cls(url, files, path.rpartition("/")[0], path, ())
        except Exception as error:  # each file system has errors of its own
            raise _cannot_be_listed(url, error) from error
        pattern = [part for part in parts[len(plain) :] if part]
        if pattern[-1] == "**":
            pattern.append("*")
        return cls(url, files, "/".join(plain) or files.root_marker, path, tuple(pattern))

    def holds(self, files: Any, path: str) -> bool:
        """Whether a place lies in a folder that is taken with all that is in it."""
        if self.path != self.root or self.files != files:
            return False
        inner, outer = (os.path.realpath(place) if is_local(files) else place for place in (path, self.root))
        return f"{inner}/".startswith(f"{outer.rstrip('/')}/")

    def units(self) -> Iterator[list[Item]]:
        """The images in units of work, none empty, in the order of their paths.

        A unit is at most 256 images of files or of one tar shard, or one row group of a Parquet file. Memory holds the
        names of one folder or tar and one unit. What cannot be read below the root is an item that says why.

        Raises:
            DataError: There is nothing, or it cannot be listed.
        """
        plain: list[Item] = []
        for item in self._walk():
            suffix = PurePosixPath(item.file).suffix.lower()
            if item.kind == "file" and suffix in _SHARD_SUFFIXES:
                yield from self._tar_units(item.file) if suffix == ".tar" else self._parquet_units(item.file)
                continue
            plain.append(item)
            if len(plain) == UNIT_IMAGES:
                yield plain
                plain = []
        if plain:
            yield plain

    def _walk(self) -> Iterator[Item]:
        """Every image file and shard, and every folder that cannot be listed."""
        if not self.pattern:
            yield from self._only_file()
            return
        folders = [(self.root, frozenset(_expand(self.pattern)))]
        visited: set[tuple[str, frozenset[tuple[str, ...]]]] = set()
        while folders:
            folder, patterns = folders.pop()
            if is_local(self.files):  # where links may lead back up
                real = os.path.realpath(folder)
                if (real, patterns) in visited:
                    continue
                visited.add((real, patterns))
            try:
                listed = sorted(self.files.ls(folder, detail=True), key=lambda info: str(info["name"]))
            except Exception as error:  # each file system has errors of its own
                if folder == self.root:
                    raise _cannot_be_listed(self.url, error) from error
                yield self._unreadable(folder, f"the folder cannot be listed ({reason(error)})")
                continue
            below = []
            for info in listed:
                path = str(info["name"]).rstrip("/")
                left = _below(patterns, PurePosixPath(path).name)
                is_link = bool(info.get("islink"))
                if info["type"] == "directory" or (is_link and self.files.isdir(path)):
                    if deeper := left - {()}:
                        below.append((path, deeper))
                # A link that leads nowhere stands for a picture; one to a device or a pipe does not.
                elif () in left and _is_wanted(path) and (info["type"] == "file" or (is_link and self._is_file(path))):
                    yield Item(self._id(path), "file", path, size=int(info.get("size") or 0))
            folders += reversed(below)

    def _only_file(self) -> Iterator[Item]:
        try:
            info = self.files.info(self.path)
        except FileNotFoundError as error:
            msg = f"{self.url} does not exist; give an image, a shard, a folder or a quoted glob pattern"
            raise DataError(msg) from error
        except Exception as error:  # each file system has errors of its own
            raise _cannot_be_listed(self.url, error) from error
        if info["type"] == "file":
            yield Item(self._id(self.path), "file", self.path, size=int(info.get("size") or 0))

    def _is_file(self, link: str) -> bool:
        return bool(self.files.isfile(link)) or not self.files.exists(link)

    def _id(self, path: str) -> str:
        return printable(path.removeprefix(self.root).lstrip("/") or PurePosixPath(path).name)

    def _unreadable(self, path: str, problem: str) -> Item:
        return Item(self._id(path), "unreadable", path, problem=problem)

    def _tar_units(self, path: str) -> Iterator[list[Item]]:
        members = self._tar_items(path)
        while unit := list(islice(members, UNIT_IMAGES)):
            yield unit

    def _tar_items(self, path: str) -> Iterator[Item]:
        seen: dict[str, int] = {}
        places: dict[str, tuple[int, int]] = {}
        links: list[tuple[str, str]] = []
        shard, version, problem = self._id(path), "", ""

        def make_item(name: str, place: tuple[int, int] | None, target: str = "") -> Item:
            shown = printable(name)
            seen[shown] = again = seen.get(shown, 0) + 1
            unique = f"{shard}/{shown}" + (f" ({again})" if again > 1 else "")
            if place is None:
                said = f"it is a link to {printable(target)}, which is no image in this tar"
                return Item(unique, "unreadable", path, stamp=version, problem=said)
            places[posixpath.normpath(name)] = place
            return Item(unique, "tar", path, *place, version)

        try:
            version = stamp(self.files.info(path))
            with self.files.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if not _is_image(member.name):
                        continue
                    if member.isreg():
                        yield make_item(member.name, (member.offset_data, member.size))
                    elif member.islnk():
                        target = posixpath.normpath(member.linkname)
                        yield make_item(member.name, places.get(target), target)
                    elif member.issym():
                        target = posixpath.join(posixpath.dirname(member.name), member.linkname)
                        links.append((member.name, posixpath.normpath(target)))
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    problem = "cut off: the mark of its end is missing; what came before is scored"
        except Exception as error:  # each file system has errors of its own
            problem = f"no plain tar, or damaged ({reason(error)}); what came before is scored"
        for name, target in links:  # what a symbolic link names may come after it
            yield make_item(name, places.get(target), target)
        if problem:
            yield self._unreadable(path, problem)

    def _parquet_units(self, path: str) -> Iterator[list[Item]]:
        shard = self._id(path)
        try:
            version = stamp(self.files.info(path))
            with self.files.open(path, "rb") as file:
                parquet = pq.ParquetFile(file)
                image_column(parquet.schema_arrow)
                counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        except Exception as error:  # each file system has errors of its own
            yield [self._unreadable(path, f"no Parquet file of images ({reason(error)})")]
            return
        first = 0
        for count in counts:
            if count:
                rows = range(first, first + count)
                yield [Item(f"{shard}#{row}", "parquet", path, row, stamp=version) for row in rows]
            first += count


def image_column(schema: pa.Schema) -> tuple[str, bool]:
    """The column that holds encoded images, and whether it is Hugging Face's struct of bytes and path.

    Raises:
        DataError: There is none, or several and none has a usual name.
    """
    found = {}
    for column in schema:
        kind = column.type
        if _is_binary(kind):
            found[column.name] = False
        elif pa.types.is_struct(kind) and any(part.name == "bytes" and _is_binary(part.type) for part in kind):
            found[column.name] = True
    named = [name for name in _IMAGE_COLUMNS if name in found] or list(found)
    if not named or (len(found) > 1 and named[0] not in _IMAGE_COLUMNS):
        msg = f"its columns are {', '.join(schema.names)}; one of encoded images is needed, best named image"
        raise DataError(msg)
    return named[0], found[named[0]]


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def stamp(info: dict[str, Any]) -> str:
    """What differs when a file was written again: its size, and its version as far as its file system tells one."""
    version = next((info[name] for name in _VERSIONS if info.get(name)), "")
    return f"{info.get('size')} {version}"


def printable(text: str) -> str:
    """A text without what UTF-8 cannot express: bytes of a file name in another encoding."""
    return text.encode(errors="backslashreplace").decode()


def reason(error: Exception) -> str:
    """An error of a file system in words."""
    return printable(str(error) or type(error).__name__)


def is_local(files: Any) -> bool:
    """Whether a file system is this machine's own."""
    return isinstance(files, LocalFileSystem)


def _cannot_be_listed(url: str, error: Exception) -> DataError:
    return DataError(f"{url}: cannot be listed ({reason(error)}); check the address and its permissions")


def _expand(pattern: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """A pattern and what it may mean as well: ``**`` stands for any number of folders, none among them."""
    yield pattern
    if pattern[:1] == ("**",):
        yield from _expand(pattern[1:])


def _below(patterns: frozenset[tuple[str, ...]], name: str) -> frozenset[tuple[str, ...]]:
    """What is left of patterns below a name; the empty one where the name is matched by a last part."""
    left: set[tuple[str, ...]] = set()
    for pattern in patterns:
        # As in a shell: a dot at the beginning is matched by a dot alone.
        if fnmatchcase(name, pattern[0]) and (pattern[0].startswith(".") or not name.startswith(".")):
            left.update(_expand(pattern if pattern[0] == "**" else pattern[1:]))
    return frozenset(left)


def _is_wanted(path: str) -> bool:
    return _is_image(path) or PurePosixPath(path).suffix.lower() in _SHARD_SUFFIXES


def _is_image(path: str) -> bool:
    name = PurePosixPath(path)
    return name.suffix.lower() in IMAGE_SUFFIXES and not name.name.startswith(".")
