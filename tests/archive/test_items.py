from __future__ import annotations

import functools
import http.server
import io
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from meliad_edge.archive.items import UNIT_IMAGES, Archive, Item, image_column
from meliad_edge.archive.read import read_unit
from meliad_edge.data.images import read_image
from meliad_edge.errors import DataError, ImageError


def items(url: str | Path) -> list[Item]:
    return [item for unit in Archive.open(str(url)).units() for item in unit]


def read_all(url: str | Path) -> dict[str, Any]:
    """The image, or the error, of every id."""
    archive = Archive.open(str(url))
    return {item.id: image for unit in archive.units() for item, image in read_unit(archive.files, unit)}


@pytest.fixture
def good(texture_set: Path) -> Path:
    return texture_set / "test" / "good" / "000.png"


@pytest.fixture
def bad(texture_set: Path) -> Path:
    return texture_set / "test" / "stain" / "000.png"


class Picky(LocalFileSystem):
    """Lists no folder named ``closed``, with an error of its own."""

    protocol = ("picky",)

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        if path.endswith("/closed"):
            raise RuntimeError("nobody may look in here")
        return super().ls(path, detail, **options)


fsspec.register_implementation("picky", Picky, clobber=True)


def test_every_kind_is_listed_once_and_read_as_its_file(mixed_archive: Any) -> None:
    archive = Archive.open(str(mixed_archive.folder))
    units = list(archive.units())
    listed = [item.id for unit in units for item in unit]
    assert sorted(listed) == sorted({*mixed_archive.pictures, *mixed_archive.bad})
    assert max(map(len, units)) <= UNIT_IMAGES
    for unit in units:
        for item, image in read_unit(archive.files, unit):
            if item.id in mixed_archive.bad:
                assert isinstance(image, ImageError)
                assert item.id in str(image)
            else:
                assert not isinstance(image, ImageError), str(image)
                assert (image == read_image(mixed_archive.pictures[item.id])).all()


def test_a_glob_counts_from_the_folder_before_it(mixed_archive: Any) -> None:
    found = {item.id for item in items(f"{mixed_archive.folder}/line*/good-*.png")}
    assert found == {name for name in mixed_archive.pictures if "/good-" in name}


def test_one_file_and_one_shard(mixed_archive: Any) -> None:
    assert [item.id for item in items(mixed_archive.folder / "line0" / "good-000.png")] == ["good-000.png"]
    assert [item.id for item in items(mixed_archive.folder / "a.parquet")] == [f"a.parquet#{row}" for row in range(10)]
    rows = [[item.first for item in unit] for unit in Archive.open(str(mixed_archive.folder / "a.parquet")).units()]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_names_that_come_twice_in_a_tar_stay_apart(good: Path, bad: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(good, "part.png")
        tar.add(bad, "part.png")
        tar.add(good, "../../part.png")
    archive = Archive.open(str(tmp_path / "x.tar"))
    (unit,) = archive.units()
    assert [item.id for item in unit] == ["x.tar/part.png", "x.tar/part.png (2)", "x.tar/../../part.png"]
    images = [image for _, image in read_unit(archive.files, unit)]
    assert all((image == read_image(path)).all() for image, path in zip(images, (good, bad, good), strict=True))


def test_of_a_tar_that_was_cut_off_the_beginning_is_scored(texture_set: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for source in sorted((texture_set / "test" / "good").iterdir()):
            tar.add(source, source.name)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[: third + 100])
    *whole, rest = items(path)
    assert [item.id for item in whole] == ["x.tar/000.png", "x.tar/001.png", "x.tar/002.png"]
    assert (rest.kind, rest.id) == ("unreadable", "x.tar")


def test_links_in_a_tar_are_the_pictures_they_lead_to(good: Path, bad: Path, tmp_path: Path) -> None:
    def add_link(name: str, kind: bytes, target: str) -> None:
        link = tarfile.TarInfo(name)
        link.type, link.linkname = kind, target
        tar.addfile(link)

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add_link("a/early.png", tarfile.SYMTYPE, "../b/bad.png")
        tar.add(good, "a/good.png")
        tar.add(bad, "b/bad.png")
        add_link("hard.png", tarfile.LNKTYPE, "a/good.png")
        add_link("gone.png", tarfile.SYMTYPE, "nowhere.png")
    images = read_all(tmp_path / "x.tar")
    assert list(images) == [f"x.tar/{name}.png" for name in ("a/good", "b/bad", "hard", "a/early", "gone")]
    assert (images["x.tar/a/early.png"] == read_image(bad)).all()
    assert (images["x.tar/hard.png"] == read_image(good)).all()
    assert "it is a link to nowhere.png, which is no image in this tar" in str(images["x.tar/gone.png"])


def test_links_that_lead_nowhere_are_errors(good: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").symlink_to(good)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere.tar")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipe.png").symlink_to(tmp_path / "pipe")
    images = read_all(tmp_path)
    assert {name for name, image in images.items() if isinstance(image, ImageError)} == {"gone.png", "gone.tar"}
    assert images.keys() == {"x.png", "gone.png", "gone.tar"}


def test_names_in_another_encoding_are_read_and_printed(good: Path, tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")
    (tmp_path / latin).mkdir()
    shutil.copy(good, tmp_path / latin / f"{latin}.png")
    with tarfile.open(tmp_path / f"{latin}.tar", "w") as tar:
        tar.add(good, f"{latin}.png")
    (tmp_path / f"{latin}.parquet").touch()
    images = read_all(tmp_path)
    shown = r"caf\udce9"
    assert images.keys() == {f"{shown}/{shown}.png", f"{shown}.tar/{shown}.png", f"{shown}.parquet"}
    error = images.pop(f"{shown}.parquet")
    assert str(error).isascii()
    assert all((image == read_image(good)).all() for image in images.values())


@pytest.mark.parametrize("below", ["", "/**/*.png"])
def test_a_folder_that_cannot_be_listed_is_an_error_and_the_rest_is_read(
    below: str, good: Path, tmp_path: Path
) -> None:
    for name in ("a", "b/closed", "c"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(good, tmp_path / name / "x.png")
    images = read_all(f"picky://{tmp_path}{below}")
    assert images.keys() == {"a/x.png", "b/closed", "c/x.png"}
    assert "the folder cannot be listed (nobody may look in here)" in str(images["b/closed"])
    with pytest.raises(DataError, match=r"cannot be listed \(nobody may look in here\); check the address"):
        items(f"picky://{tmp_path}/b/closed{below}")


def test_a_glob_takes_links_as_a_folder_does(good: Path, tmp_path: Path) -> None:
    real, archive = tmp_path / "real", tmp_path / "archive"
    real.mkdir()
    shutil.copy(good, real / "x.png")
    (archive / "a").mkdir(parents=True)
    (archive / "a" / "file.png").symlink_to(real / "x.png")
    (archive / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (archive / "folder").symlink_to(real)
    (archive / "a" / "round").symlink_to(archive)
    everything = [item.id for item in items(archive)]
    assert everything == ["a/file.png", "a/gone.png", "folder/x.png"]
    assert [item.id for item in items(f"{archive}/**/*.png")] == everything
    # The same folder under the name that is asked for, though the walk came to it under another before.
    assert [item.id for item in items(f"{archive}/**/round/*older/*")] == ["a/round/folder/x.png"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.png", ["x.png"]),
        ("a/**", ["a/b/x.png", "a/x.png"]),
        ("**/x.png", ["a/b/x.png", "a/x.png", "x.png"]),
        ("*/b/?.png", ["a/b/x.png"]),
        ("**/b/**/*", ["a/b/x.png"]),
        ("[!a]*/*/*.png", []),
        (".h*/*.png", [".hidden/x.png"]),
    ],
)
def test_a_glob_finds_what_a_shell_finds(pattern: str, found: list[str], good: Path, tmp_path: Path) -> None:
    for place in (".", "a", "a/b", ".hidden"):
        (tmp_path / place).mkdir(exist_ok=True)
        shutil.copy(good, tmp_path / place / "x.png")
    archive = Archive.open(f"{tmp_path}/{pattern}")
    listed = sorted(item.file for unit in archive.units() for item in unit)
    assert listed == [f"{tmp_path}/{name}" for name in found]


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(good: Path, tmp_path: Path) -> None:
    (tmp_path / "line [2]").mkdir()
    shutil.copy(good, tmp_path / "line [2]" / "x.png")
    assert [item.id for item in items(tmp_path / "line [2]")] == ["x.png"]
    assert [item.id for item in items(tmp_path / "line [2]" / "x.png")] == ["x.png"]


def test_only_a_folder_holds_what_lies_in_it(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    shutil.copy(good, folder / "x.png")
    files = LocalFileSystem()
    assert Archive.open(str(folder)).holds(files, f"{folder}/out")
    assert Archive.open(f"file://{folder}").holds(files, f"{tmp_path}/other/../archive/out")
    assert not Archive.open(str(folder)).holds(files, f"{tmp_path}/archive2")
    assert not Archive.open(f"{folder}/x.png").holds(files, f"{folder}/out")
    assert not Archive.open(f"{folder}/*.png").holds(files, f"{folder}/out")
    assert not Archive.open(str(folder)).holds(fsspec.filesystem("memory"), f"{folder}/out")


def test_a_shard_that_was_replaced_gives_errors_not_other_pictures(
    good: Path, bad: Path, write_parquet: Any, tmp_path: Path
) -> None:
    def write(first: Path, second: Path) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(first, "first.png")
            tar.add(second, "second.png")
        write_parquet(tmp_path / "x.parquet", [first.read_bytes(), second.read_bytes()])

    write(good, bad)
    archive = Archive.open(str(tmp_path))
    units = list(archive.units())
    write(bad, good)
    for name in ("x.tar", "x.parquet"):
        os.utime(tmp_path / name, (2e9, 2e9))
    read = [image for unit in units for _, image in read_unit(archive.files, unit)]
    assert len(read) == 4
    assert all("its shard changed since it was listed" in str(image) for image in read)


@pytest.mark.parametrize("rows", [6, 2])
def test_rows_that_a_file_lost_are_errors(rows: int, good: Path, write_parquet: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, [good.read_bytes()] * 8)
    archive = Archive.open(str(path))
    # As on a file system that tells nothing of the version of a file.
    second = [replace(item, stamp="") for item in list(archive.units())[1]]
    write_parquet(path, [good.read_bytes()] * rows)
    read = list(read_unit(archive.files, second))
    assert [item for item, _ in read] == second
    lost = [image for _, image in read if isinstance(image, ImageError)]
    assert len(lost) == 4 - max(0, rows - 4)
    assert all("changed" in str(error) for error in lost)


def test_a_column_that_was_renamed_gives_errors(good: Path, write_parquet: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, [good.read_bytes()] * 2)
    archive = Archive.open(str(path))
    ((one, two),) = archive.units()
    pq.write_table(pa.table({"a": [b""], "b": [b""]}), path)
    read = list(read_unit(archive.files, [replace(item, stamp="") for item in (one, two)]))
    assert len(read) == 2
    assert all("best named image" in str(image) for _, image in read)


def test_a_struct_whose_bytes_are_text_is_no_column_of_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": "text", "path": "x.png"}]}), tmp_path / "x.parquet")
    (item,) = items(tmp_path)
    assert (item.kind, item.id) == ("unreadable", "x.parquet")
    assert "one of encoded images is needed" in item.problem


def test_many_files_become_units(texture_set: Path, tmp_path: Path) -> None:
    source = texture_set / "test" / "good" / "000.png"
    for index in range(UNIT_IMAGES + 3):
        (tmp_path / f"{index:04d}.png").symlink_to(source)
    units = list(Archive.open(str(tmp_path)).units())
    assert [len(unit) for unit in units] == [UNIT_IMAGES, 3]
    assert [item.id for unit in units for item in unit] == sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("/none/at/all", "/none/at/all does not exist; give an image"),
        ("gopher://x/y", "give a path or a URL that fsspec knows"),
    ],
)
def test_what_is_not_there_is_one_clear_error(url: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        items(url)


def test_the_column_of_images_is_found_or_asked_for() -> None:
    binary, struct = pa.binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert image_column(pa.schema([("mask", binary), ("image", struct)])) == ("image", True)
    assert image_column(pa.schema([("label", pa.int64()), ("photo", pa.large_binary())])) == ("photo", False)
    for schema in (pa.schema([("a", binary), ("b", binary)]), pa.schema([("label", pa.int64())])):
        with pytest.raises(DataError, match="best named image"):
            image_column(schema)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """A folder on a web server that lists folders, all but those named ``closed``, and gives no parts of files."""
    pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http://")

    class Server(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def list_directory(self, path: Any) -> io.BytesIO | None:
            if Path(path).name == "closed":
                self.send_error(403)
                return None
            return super().list_directory(path)

    handler = functools.partial(Server, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def served(mixed_archive: Any) -> Iterator[str]:
    with serve(mixed_archive.folder / "line1") as url:
        yield url


@pytest.mark.parametrize("below", ["", "*.png"])
def test_an_archive_may_be_anywhere(below: str, served: str, mixed_archive: Any) -> None:
    archive = Archive.open(f"{served}{below}")
    (unit,) = archive.units()
    expected = {name.removeprefix("line1/") for name in mixed_archive.pictures if name.startswith("line1/")}
    assert {item.id for item in unit} == expected
    item, image = next(read_unit(archive.files, unit))
    assert not isinstance(image, ImageError), str(image)
    assert (image == read_image(mixed_archive.pictures[f"line1/{item.id}"])).all()


def test_what_a_web_server_refuses_is_an_error_and_the_rest_is_read(good: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    for name in ("x.png", "closed/x.png"):
        shutil.copy(good, tmp_path / name)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        large = tarfile.TarInfo("more than is fetched at a time")
        large.size = 6_000_000
        tar.addfile(large, io.BytesIO(bytes(large.size)))
        tar.add(good, "x.png")
    with serve(tmp_path) as url:
        images = read_all(url)
        assert images.keys() == {"closed", "x.png", "x.tar"}
        assert "the folder cannot be listed (403" in str(images["closed"])
        assert "no plain tar, or damaged" in str(images["x.tar"])
        assert (images["x.png"] == read_image(good)).all()
        with pytest.raises(DataError, match="cannot be listed .403"):
            items(f"{url}closed")
