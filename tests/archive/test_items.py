from __future__ import annotations

import functools
import http.server
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from meliad_edge.archive.items import UNIT_IMAGES, Archive, Item, image_column
from meliad_edge.archive.read import read_unit
from meliad_edge.data.images import read_image
from meliad_edge.errors import DataError, ImageError


def items(url: str | Path) -> list[Item]:
    return [item for unit in Archive.open(str(url)).units() for item in unit]


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


def test_names_that_come_twice_in_a_tar_stay_apart(texture_set: Path, tmp_path: Path) -> None:
    good, bad = texture_set / "test" / "good" / "000.png", texture_set / "test" / "stain" / "000.png"
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


@pytest.fixture
def served(mixed_archive: Any) -> Iterator[str]:
    """The archive on a web server that lists its folders."""
    pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http://")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(mixed_archive.folder / "line1"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_an_archive_may_be_anywhere(served: str, mixed_archive: Any) -> None:
    archive = Archive.open(served)
    (unit,) = archive.units()
    expected = {name.removeprefix("line1/") for name in mixed_archive.pictures if name.startswith("line1/")}
    assert {item.id for item in unit} == expected
    item, image = next(read_unit(archive.files, unit))
    assert not isinstance(image, ImageError), str(image)
    assert (image == read_image(mixed_archive.pictures[f"line1/{item.id}"])).all()
