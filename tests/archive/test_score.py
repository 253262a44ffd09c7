from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.workshop


def link_many(texture_set: Path, archive: Path) -> Path:
    sources = sorted((texture_set / "test").rglob("*.png"))
    archive.mkdir()
    for index in range(2000):
        (archive / f"{index:05d}.png").symlink_to(sources[index % len(sources)])
    return archive


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    program = "from meliad_edge.cli import main; main()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def read_rows(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / "results").to_pylist()
    return rows


@pytest.fixture(scope="module")
def scored(small_bundle: Path, mixed_archive: Any, invoke: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The mixed archive, scored. Read only."""
    out = tmp_path_factory.mktemp("scored") / "out"
    return out, invoke("score", small_bundle, mixed_archive.folder, "--out", out, "--worst", 6, "--json")


def test_each_image_has_one_row_that_says_what_predict_says(
    scored: Any, small_bundle: Path, mixed_archive: Any, invoke: Any
) -> None:
    out, _ = scored
    rows = {row["id"]: row for row in read_rows(out)}
    assert len(rows) == len(read_rows(out))
    assert set(rows) == {*mixed_archive.pictures, *mixed_archive.bad}
    ids = [name for name in rows if name in mixed_archive.pictures]
    alone = invoke("predict", small_bundle, *(mixed_archive.pictures[name] for name in ids), "--json").json
    assert 4 < sum(prediction["is_anomaly"] for prediction in alone["predictions"]) < len(ids)
    for name, expected in zip(ids, alone["predictions"], strict=True):
        row = rows[name]
        assert row["score"] == pytest.approx(expected["score"], rel=1e-4, abs=1e-4)
        assert row["is_anomaly"] == expected["is_anomaly"]
        assert (row["width"], row["height"]) == (128, 128)
        assert row["model_sha256"] == alone["model_sha256"]
        assert row["error"] is None
        if expected["is_anomaly"]:
            region = expected["regions"][0]
            assert row["region"] == {name: region[name] for name in ("x", "y", "width", "height")}
            assert row["resembles"] == region["resembles"]["defect"]
        else:
            assert row["region"] is None


def test_bad_files_are_listed_and_not_fatal(scored: Any, mixed_archive: Any) -> None:
    out, outcome = scored
    assert outcome.code == 9
    assert outcome.error_line.startswith(
        f"6 of {len(mixed_archive.pictures) + 6} images could not be decided; errors.csv"
    )
    with (out / "errors.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert {row["id"] for row in listed} == mixed_archive.bad
    assert all(row["error"] for row in listed)
    assert outcome.json["errors"] == 6 and outcome.json["missing"] == 0
    assert json.loads((out / "summary.json").read_text())["images"] == outcome.json["images"]


def test_the_highest_scores_come_first_in_pictures(scored: Any) -> None:
    out, _ = scored
    scores = sorted((row["score"] for row in read_rows(out) if row["error"] is None), reverse=True)
    page = (out / "worst.html").read_text()
    places = [page.index(f"{score:.3f} ANOMALY") for score in scores[:6]]
    assert places == sorted(places)
    pictures = sorted((out / "worst").iterdir())
    assert len(pictures) == 6
    assert all(picture.name in page for picture in pictures)
    assert cv2.imread(str(pictures[0])).shape == (240, 240, 3)


def test_a_second_run_goes_on_where_one_was_stopped(
    scored: Any, small_bundle: Path, mixed_archive: Any, invoke: Any, tmp_path: Path
) -> None:
    out = shutil.copytree(scored[0], tmp_path / "out")
    before = read_rows(out)
    kept, *removed = sorted((out / "results").iterdir())
    for path in removed[::2]:
        path.unlink()
    stamp = kept.stat().st_mtime_ns
    (mixed_archive.folder / "line0" / "new.png").write_bytes(b"came later, is for the next result")
    try:
        outcome = invoke("score", small_bundle, mixed_archive.folder, "--out", out, "--worst", 0)
    finally:
        (mixed_archive.folder / "line0" / "new.png").unlink()
    assert outcome.code == 9
    assert kept.stat().st_mtime_ns == stamp
    after = read_rows(out)
    assert [row | {"score": None} for row in after] == [row | {"score": None} for row in before]
    # Each worker measures which batch size pays, and another one rounds differently.
    scores, again = ([row["score"] for row in rows if row["score"] is not None] for rows in (before, after))
    assert again == pytest.approx(scores, rel=1e-4)


@pytest.mark.parametrize("killed", ["worker that starts", "worker", "all"])
def test_nothing_is_lost_or_doubled_when_processes_are_killed(
    killed: str, small_bundle: Path, texture_set: Path, invoke: Any, tmp_path: Path
) -> None:
    archive, out = link_many(texture_set, tmp_path / "many"), tmp_path / "out"
    run = start("score", small_bundle, archive, "--out", out, "--worst", 0, "--workers", 2)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while not list((out / "results").glob("unit-*.parquet")):
        assert run.poll() is None
        if killed == "worker that starts" and len(children.read_text().split()) == 3:  # two workers, Python's own
            break
        time.sleep(0.02)
    if killed == "all":
        os.killpg(run.pid, signal.SIGKILL)
    else:
        os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    assert run.wait(60) != 0
    assert run.stderr is not None
    if killed != "all":
        assert "a worker died" in run.stderr.read().splitlines()[-1]
    run.stderr.close()
    assert len(list((out / "results").glob("unit-*.parquet"))) < 8
    assert invoke("score", small_bundle, archive, "--out", out, "--worst", 0).code == 0
    ids = [row["id"] for row in read_rows(out)]
    assert sorted(ids) == sorted(path.name for path in archive.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_run(number: int, small_bundle: Path, texture_set: Path, tmp_path: Path) -> None:
    archive, out, temporary = link_many(texture_set, tmp_path / "many"), tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    arguments = ("score", small_bundle, archive, "--out", out, "--worst", 0, "--workers", 2)
    run = start(*arguments, env={**os.environ, "TMPDIR": str(temporary)})
    while not list((out / "results").glob("unit-*.parquet")):
        assert run.poll() is None
        time.sleep(0.02)
    children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    assert len(children) == 3  # two workers, Python's own
    os.kill(run.pid, number)
    try:
        _, said = run.communicate(timeout=20)  # at the end of the last one that holds its standard error
        deadline = time.monotonic() + 10
        while any(map(is_running, children)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(is_running, children))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    if number == signal.SIGTERM:
        assert (run.returncode, "Traceback" in said) == (130, False)
        assert not list(temporary.glob("tmp*"))
    assert len(list((out / "results").glob("unit-*.parquet"))) < 8


def test_images_without_a_row_are_no_success(
    scored: Any, small_bundle: Path, mixed_archive: Any, invoke: Any, tmp_path: Path
) -> None:
    out = shutil.copytree(scored[0], tmp_path / "out")
    unit = next((out / "results").iterdir())
    table = pq.read_table(unit)
    pq.write_table(table.slice(0, table.num_rows - 1), unit)
    outcome = invoke("score", small_bundle, mixed_archive.folder, "--out", out, "--worst", 0, "--json")
    assert outcome.code == 9
    images = len(mixed_archive.pictures) + len(mixed_archive.bad)
    assert outcome.error_line.startswith(f"1 of {images} images have no row in {out}")
    assert outcome.json["missing"] == 1


def test_a_picture_that_is_gone_is_not_drawn(
    small_bundle: Path, texture_set: Path, write_parquet: Any, invoke: Any, tmp_path: Path
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    sources = sorted((texture_set / "test" / "stain").iterdir())
    write_parquet(archive / "a.parquet", [source.read_bytes() for source in sources[:2]])
    write_parquet(archive / "b.parquet", [source.read_bytes() for source in sources[2:4]])
    for source in sources[4:6]:
        shutil.copy(source, archive / source.name)
    arguments = ("score", small_bundle, archive, "--out", out, "--workers", 1, "--worst", 6)
    assert invoke(*arguments).code == 0
    assert len(list((out / "worst").iterdir())) == 6
    shutil.rmtree(out / "worst")
    (archive / sources[4].name).unlink()
    write_parquet(archive / "b.parquet", [sources[2].read_bytes()])
    assert invoke(*arguments).code == 0
    page = (out / "worst.html").read_text()
    drawn = {row["id"] for row in read_rows(out) if f">{row['id']}<" in page}
    assert len(drawn) == len(list((out / "worst").iterdir())) == 3
    assert drawn == {"a.parquet#0", "a.parquet#1", sources[5].name}


def test_another_model_or_archive_needs_another_folder(
    scored: Any, small_bundle: Path, bundle_file: Path, mixed_archive: Any, texture_set: Path, invoke: Any
) -> None:
    out, _ = scored
    outcome = invoke("score", bundle_file, mixed_archive.folder, "--out", out)
    assert (outcome.code, "holds a result with model_sha256" in outcome.error_line) == (2, True)
    outcome = invoke("score", small_bundle, texture_set, "--out", out)
    assert (outcome.code, "holds a result with archive" in outcome.error_line) == (2, True)


def test_what_cannot_work_is_refused(small_bundle: Path, texture_set: Path, invoke: Any, tmp_path: Path) -> None:
    outcome = invoke("score", small_bundle, texture_set, "--out", texture_set / "scored")
    assert (outcome.code, "lies in the archive" in outcome.error_line) == (2, True)
    outcome = invoke("score", small_bundle, texture_set, "--out", f"file://{texture_set}/scored")
    assert (outcome.code, "lies in the archive" in outcome.error_line) == (2, True)
    assert not (texture_set / "scored").exists()
    (tmp_path / "empty").mkdir()
    outcome = invoke("score", small_bundle, tmp_path / "empty", "--out", tmp_path / "out")
    assert outcome.code == 3
    assert "no images in it; images, .tar shards and .parquet files" in outcome.error_line
    assert not list((tmp_path / "out").glob("items*"))
    outcome = invoke("score", small_bundle, texture_set, "--out", "gopher://x/y")
    assert outcome.code == 2
