from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.dataset
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from meliad_edge.archive import folder as folder_module
from meliad_edge.archive.folder import ResultFolder
from meliad_edge.archive.items import Archive
from meliad_edge.errors import DataError, UsageError

RUN = {"archive": "x", "model_sha256": "0", "threshold": 1.0}


class Bucket(MemoryFileSystem):
    """As object stores are: there are no folders, least of all empty ones."""

    protocol = "bucket"
    store: dict[str, Any] = {}
    pseudo_dirs: list[str] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("bucket:/"))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass


fsspec.register_implementation("bucket", Bucket, clobber=True)


@pytest.fixture
def images(texture_set: Path) -> Archive:
    return Archive.open(str(texture_set / "test" / "good"))


def test_a_result_begins_where_there_are_no_folders(images: Archive) -> None:
    out = ResultFolder.open("bucket://results/2026")
    out.begin(images, RUN)
    assert (out.sizes(), out.finished()) == ([8], set())
    assert out.read_unit(0) == next(images.units())
    out.write_result(0, pa.table({"id": ["x"]}))
    assert out.finished() == {0}
    assert sorted(out.files.store) == [
        f"/results/2026/{name}" for name in ("items.parquet", "results/unit-00000000.parquet", "run.json")
    ]


def test_a_name_in_another_encoding_is_kept_as_it_is(texture_set: Path, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    shutil.copy(texture_set / "test" / "good" / "000.png", tmp_path / "archive" / os.fsdecode(b"caf\xe9.png"))
    out = ResultFolder.open(str(tmp_path / "out"))
    out.begin(Archive.open(str(tmp_path / "archive")), RUN)
    (item,) = out.read_unit(0)
    assert item.id == r"caf\udce9.png"
    assert Path(item.file).exists()


def test_a_wrong_archive_leaves_the_folder_to_the_right_one(images: Archive, tmp_path: Path) -> None:
    out = ResultFolder.open(str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "none"):
        with pytest.raises(DataError):
            out.begin(Archive.open(str(tmp_path / wrong)), {**RUN, "archive": wrong})
    out.begin(images, RUN)
    with pytest.raises(UsageError, match="holds a result with archive x, not y"):
        out.begin(images, {**RUN, "archive": "y"})
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == RUN
    assert [path.name for path in tmp_path.glob("out/items*")] == ["items.parquet"]


@pytest.mark.parametrize("failures", [1, 3, 4])
def test_a_place_that_fails_for_a_while_is_tried_again(
    failures: int, images: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ResultFolder.open(str(tmp_path / "out"))
    out.begin(images, RUN)
    slept: list[float] = []
    monkeypatch.setattr(folder_module.time, "sleep", slept.append)
    replace = Path.replace

    def fail_at_first(self: Path, target: Path) -> Path:
        if len(attempts) < failures:
            attempts.append(self)
            raise OSError("the network is away")
        return replace(self, target)

    attempts: list[Path] = []
    monkeypatch.setattr(Path, "replace", fail_at_first)
    if failures == 4:
        with pytest.raises(OSError, match="the network is away"):
            out.write_result(0, pa.table({"id": ["x"]}))
    else:
        out.write_result(0, pa.table({"id": ["x"]}))
    assert out.finished() == (set() if failures == 4 else {0})
    assert len(slept) == min(failures, 3)
    assert pa.dataset.dataset(tmp_path / "out" / "results").count_rows() == (failures < 4)
