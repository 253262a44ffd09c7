from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the extra archive is not installed")
pytest.importorskip("fsspec", reason="the extra archive is not installed")


@dataclass(frozen=True)
class Mixed:
    """An archive of every kind that is read.

    Attributes:
        folder: Where it is.
        pictures: The image behind each id that can be read.
        bad: Ids that cannot.
    """

    folder: Path
    pictures: dict[str, Path]
    bad: set[str]


def write_parquet(path: Path, pictures: list[bytes | None], *, row_group_size: int = 4, as_struct: bool = True) -> None:
    """As Hugging Face writes them, or as plain bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(pictures)] if as_struct else pictures
    table = pa.table({"label": list(range(len(pictures))), "image": values})
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.fixture(name="write_parquet")
def parquet_writer() -> Callable[..., None]:
    return write_parquet


@pytest.fixture(scope="session")
def mixed_archive(texture_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """Files, a tar shard, two Parquet shards, and what is wrong with archives. Read only."""
    folder = tmp_path_factory.mktemp("archive") / "2026"
    sources = sorted((texture_set / "test").rglob("*.png"))
    pictures: dict[str, Path] = {}
    for index, source in enumerate(sources):
        place = f"line{index % 2}/{source.parent.name}-{source.name}"
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / place)
        pictures[place] = source
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for source in sources[:5]:
            tar.add(source, source.name)
        tar.add(texture_set, "notes.txt", recursive=False)
    for source, name in zip(sources[:5], ("000", "001", "002", "003", "004"), strict=True):
        pictures[f"shard.tar/{name}.png"] = source
    write_parquet(folder / "a.parquet", [source.read_bytes() for source in sources[:10]])
    pictures |= {f"a.parquet#{row}": source for row, source in enumerate(sources[:10])}
    write_parquet(folder / "b.parquet", [sources[0].read_bytes(), None, b"no image"], as_struct=False)
    pictures["b.parquet#0"] = sources[0]
    (folder / "line0" / "damaged.png").write_bytes(sources[0].read_bytes()[:200])
    (folder / "line0" / "empty.jpg").touch()
    (folder / "line0" / ".hidden.png").write_bytes(b"")
    (folder / "line0" / "notes.txt").write_text("not looked at")
    (folder / "round").symlink_to(folder)
    (folder / "packed.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    (folder / "numbers.parquet").write_bytes(b"PAR1 and nothing more")
    bad = {"line0/damaged.png", "line0/empty.jpg", "packed.tar", "numbers.parquet", "b.parquet#1", "b.parquet#2"}
    return Mixed(folder, pictures, bad)
