from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import meliad_edge
from meliad_edge.benchmarks.__main__ import main
from meliad_edge.benchmarks.ablation import ABLATIONS
from meliad_edge.benchmarks.accuracy import Plan, Setting, parse_settings, run
from meliad_edge.benchmarks.accuracy_table import PUBLISHED_MARK, to_markdown
from meliad_edge.benchmarks.job import Job, Variant
from meliad_edge.benchmarks.pool import run_and_keep
from meliad_edge.benchmarks.published import PUBLISHED
from meliad_edge.benchmarks.sources import source_digest
from meliad_edge.benchmarks.summary import summarise
from meliad_edge.errors import DataError, MeliadError, UsageError
from meliad_edge.models import create_detector

pytestmark = pytest.mark.workshop

RECONSTRUCTION = Variant("short training", "meliad-reconstruction", {"steps": 5})


def plan(data: Path, folder: Path, **changes: Any) -> Plan:
    """Two detectors, one of which needs labels, on small pictures; in all settings."""
    standard = Plan(
        variants=(Variant("meliad", "meliad"), RECONSTRUCTION),
        sets=(str(data),),
        settings=parse_settings("3,0,hard3"),
        data_folder=folder / "nothing",
        set_cache=folder / "sets",
        feature_cache=folder / "features",
        work=folder / "results",
        seeds=2,
        image_size=64,
        workers=2,
    )
    return replace(standard, **changes)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The real command line in this process; returns the exit code."""

    def invoke(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    return invoke


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accuracy")


@pytest.fixture(scope="module")
def result(texture_set: Path, work: Path) -> dict[str, Any]:
    return run(plan(texture_set, work))


def rows_of(result: dict[str, Any], setting: str) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in result["rows"] if row["setting"] == setting}


def figures(result: dict[str, Any]) -> Any:
    """What the runs found, without what was measured on the way; floats as far as two processes agree on them."""
    measured = ("fit_s", "evaluate_s", "environment")
    runs = [run for row in result["rows"] for run in row.get("runs", [])]
    return _rounded([{key: value for key, value in run.items() if key not in measured} for run in runs])


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return pytest.approx(value, rel=0.05) if isinstance(value, float) else value


def test_row_has_mean_spread_and_intervals_over_seeds(result: dict[str, Any]) -> None:
    row = rows_of(result, "3-shot")["meliad"]
    aurocs = [run["image_auroc"] for run in row["runs"]]
    assert [run["seed"] for run in row["runs"]] == [0, 1]
    assert row["seeds"] == 2
    assert row["mean"]["image_auroc"] == pytest.approx(sum(aurocs) / 2)
    assert row["std"]["image_auroc"] == pytest.approx(abs(aurocs[0] - aurocs[1]) / 2**0.5)
    assert row["ci_seeds"]["image_auroc"] == pytest.approx(sorted(aurocs))
    lows = [run["pixel_ap_ci"][0] for run in row["runs"]]
    assert row["ci_images"]["pixel_ap"][0] == pytest.approx(sum(lows) / 2)
    assert set(row["mean"]) >= {"image_ap", "image_f1_max", "pixel_auroc", "aupro_30", "aupro_05", "fit_s", "misses"}


def test_detector_without_its_labels_is_a_row_without_figures(result: dict[str, Any]) -> None:
    row = rows_of(result, "0-shot")["short training"]
    assert "labelled defects" in row["not_run"]
    assert "mean" not in row
    assert rows_of(result, "0-shot")["meliad"]["mean"]["image_auroc"] > 0.5


def test_second_call_computes_nothing(texture_set: Path, work: Path, result: dict[str, Any]) -> None:
    kept = sorted((work / "results").iterdir())
    assert len(kept) == 2 * 2 * 4  # detectors, seeds, and settings of which hard has two classes
    before = [(file.name, file.stat().st_mtime_ns) for file in kept]
    again = run(plan(texture_set, work))
    assert [(file.name, file.stat().st_mtime_ns) for file in sorted((work / "results").iterdir())] == before
    assert again["rows"] == result["rows"]


def test_interrupted_run_goes_on_and_one_process_gives_what_two_give(
    texture_set: Path, work: Path, result: dict[str, Any]
) -> None:
    interrupted = work / "interrupted"
    shutil.copytree(work / "results", interrupted)
    lost = [
        *interrupted.glob("metal_3-shot_meliad_seed1_*.json"),
        *interrupted.glob("metal_3-shot_meliad-reconstruction_seed0_*.json"),
    ]
    assert len(lost) == 2
    for file in lost:
        file.unlink()
    before = {file: file.stat().st_mtime_ns for file in interrupted.iterdir()}
    again = run(plan(texture_set, work, work=interrupted, workers=1))
    after = {file: file.stat().st_mtime_ns for file in interrupted.iterdir()}
    assert {file for file in after if after[file] != before.get(file)} == set(lost)
    assert figures(again) == figures(result)


@pytest.mark.filterwarnings("ignore::Warning")  # Ray's own
def test_a_cluster_gives_what_processes_give(texture_set: Path, work: Path, result: dict[str, Any]) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    elsewhere = work / "on-ray"
    shutil.copytree(work / "results", elsewhere)
    (lost,) = elsewhere.glob("metal_3-shot_meliad_seed1_*.json")
    lost.unlink()
    again = run(plan(texture_set, work, work=elsewhere, ray="local"))
    assert lost.exists()
    assert figures(again) == figures(result)


def test_result_has_another_name_when_what_it_depends_on_changes(texture_set: Path, tmp_path: Path) -> None:
    copy = tmp_path / "metal"
    shutil.copytree(texture_set, copy)
    job = Job("metal", str(copy), "meliad-reconstruction", shots=3, seed=0)
    others = [
        replace(job, shots=2),
        replace(job, seed=1),
        replace(job, image_size=128),
        replace(job, shot_class="stain"),
        replace(job, options={"steps": 5}),
        replace(job, detector="meliad"),
        replace(job, data=str(texture_set.parent / "metal"), set_name="other"),
    ]
    assert len({job.file_name(), *(other.file_name() for other in others)}) == 1 + len(others)
    moved = replace(job, data=str(texture_set))
    assert moved.file_name() == job.file_name(), "the same images at another place"
    picture = next((copy / "test" / "stain").glob("*.png"))
    smaller = tmp_path / "smaller"
    shutil.copytree(texture_set, smaller)
    (smaller / picture.relative_to(copy)).unlink()
    assert replace(job, data=str(smaller)).file_name() != job.file_name()


def test_digest_follows_what_a_module_imports(tmp_path: Path) -> None:
    package = tmp_path / "meliad_edge"
    shutil.copytree(Path(meliad_edge.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "results"))

    def digests() -> list[str]:
        modules = ("meliad_edge.models.meliad", "meliad_edge.models.reconstruction")
        return [source_digest.__wrapped__("meliad_edge.benchmarks.job", module, root=package) for module in modules]

    def change(file: str) -> None:
        with (package / file).open("a", encoding="utf-8") as opened:
            opened.write("\n# changed\n")

    meliad, reconstruction = digests()
    assert meliad != reconstruction
    change("models/meliad.py")
    assert digests()[0] != meliad
    assert digests()[1] == reconstruction, "a change to one detector leaves the results of the others valid"
    for indirectly_imported in ("metrics.py", "models/features.py", "data/images.py", "benchmarks/job.py"):
        before = digests()
        change(indirectly_imported)
        assert all(new != old for new, old in zip(digests(), before, strict=True)), indirectly_imported
    before = digests()
    change("stream/watcher.py")
    assert digests() == before


def test_hard_setting_takes_each_class_in_turn(result: dict[str, Any]) -> None:
    row = rows_of(result, "hard, 3-shot")["meliad"]
    assert [(run["seed"], run["shot_class"]) for run in row["runs"]] == [
        (0, "scratch"), (0, "stain"), (1, "scratch"), (1, "stain"),
    ]  # fmt: skip
    assert {run["test_anomalies"] for run in row["runs"]} == {8}, "the test lacks the class of the shots"
    scratch_0, stain_0, scratch_1, stain_1 = (run["image_ap"] for run in row["runs"])
    assert row["mean"]["image_ap"] == pytest.approx((scratch_0 + stain_0 + scratch_1 + stain_1) / 4)
    assert row["std"]["image_ap"] == pytest.approx(abs(scratch_0 + stain_0 - scratch_1 - stain_1) / 2 / 2**0.5)
    by_class = {name: of_class["mean"]["image_ap"] for name, of_class in row["classes"].items()}
    assert by_class == pytest.approx({"scratch": (scratch_0 + scratch_1) / 2, "stain": (stain_0 + stain_1) / 2})
    assert "| hard, 3-shot | meliad         | stain" in to_markdown(result)


def test_hard_setting_leaves_out_what_is_too_small(texture_set: Path, work: Path) -> None:
    result = run(plan(texture_set, work, settings=parse_settings("hard")))
    assert result["rows"] == []
    assert result["left_out"] == ["metal, hard: classes with fewer than 10 images left out: scratch, stain"]


def test_table_says_what_was_measured_and_what_was_not(result: dict[str, Any]) -> None:
    text = to_markdown({**result, "command": "python -m meliad_edge.benchmarks accuracy"})
    lines = text.splitlines()
    (header,) = (line for line in lines if line.startswith("| setting") and "fit, s" in line)
    (measured,) = (
        line for line in lines if line.startswith("| 3-shot") and "run by us" in line and "| meliad " in line
    )
    cells = dict(zip(cells_of(header), cells_of(measured), strict=True))
    row = rows_of(result, "3-shot")["meliad"]
    for name, key in (("image AUROC", "image_auroc"), ("AUPRO .05", "aupro_05")):
        mean, std = cells[name].split(" ± ")
        assert float(mean) == pytest.approx(row["mean"][key], abs=5e-4)
        assert float(std) == pytest.approx(row["std"][key], abs=5e-4)
    assert cells["seeds"] == "2"
    assert "not run: meliad-reconstruction learns from labelled defects" in text
    assert "95 % intervals of the mean: over images / over seeds." in text
    assert "Command: `python -m meliad_edge.benchmarks accuracy`" in text
    assert PUBLISHED_MARK not in text, "nothing is published of this set"
    low, high = row["ci_images"]["image_auroc"]
    assert f"{low:.3f}–{high:.3f}".replace("0.", ".") in text


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_published_rows_stand_beside_ours_and_are_marked(result: dict[str, Any]) -> None:
    ours = [{**row, "set": "elpv", "setting": row["setting"].replace("3-shot", "10-shot")} for row in result["rows"]]
    published = [{name: getattr(figure, name) for name in figure.__dataclass_fields__} for figure in PUBLISHED]
    lines = to_markdown({**result, "rows": ours, "published": published}).splitlines()
    marked = [cells_of(line) for line in lines if PUBLISHED_MARK in line]
    assert {(cells[0], cells[1], cells[2]) for cells in marked} == {
        ("10-shot", "DPDL", ".937"),
        ("10-shot", "AHL", ".850"),
        ("10-shot", "DevNet", ".846"),
        ("10-shot", "DRA", ".845"),
        ("10-shot", "FLOS", ".818"),
        ("0-shot", "PatchCore", ".916"),
    }, "those of the settings that were run"
    assert all("paper" in cells[-1] for cells in marked)


def test_summary_against_plain_formulas() -> None:
    rng = np.random.default_rng(7)
    values = rng.uniform(0.5, 1.0, (6, 2))
    seeds = [[{"a": float(v), "a_ci": [v - 0.1, v + 0.2], "b": None, "flag": True} for v in pair] for pair in values]
    found = summarise(seeds)
    means = [sum(pair) / 2 for pair in values.tolist()]
    mean = sum(means) / 6
    assert found["mean"] == {"a": pytest.approx(mean)}, "what is absent or no number has no mean"
    assert found["std"]["a"] == pytest.approx((sum((m - mean) ** 2 for m in means) / 5) ** 0.5)
    assert found["ci_images"]["a"] == pytest.approx([mean - 0.1, mean + 0.2])
    low, high = found["ci_seeds"]["a"]
    # The bootstrap distribution of a mean is nearly normal with the variance of the sample over n.
    spread = (sum((m - mean) ** 2 for m in means) / 36) ** 0.5
    assert low == pytest.approx(mean - 1.96 * spread, abs=0.25 * spread)
    assert high == pytest.approx(mean + 1.96 * spread, abs=0.25 * spread)
    assert summarise(seeds[:1])["std"] == {}


def test_settings_are_read() -> None:
    assert parse_settings("10, 1,0,hard,hard,hard3") == (
        Setting(10),
        Setting(1),
        Setting(0),
        Setting(10, is_hard=True),
        Setting(3, is_hard=True),
    )
    with pytest.raises(UsageError, match="'easy'"):
        parse_settings("10,easy")


def test_ablations_are_options_that_exist_and_differ() -> None:
    detectors = [create_detector(variant.detector, variant.options) for variant in ABLATIONS]
    assert len(set(detectors)) == len(ABLATIONS) == len({variant.label for variant in ABLATIONS})


def test_unknown_detector_and_data_stop_before_anything_runs(texture_set: Path, work: Path) -> None:
    with pytest.raises(UsageError, match="'nonsense'"):
        run(plan(texture_set, work, variants=(Variant("nonsense", "nonsense"),)))
    with pytest.raises(DataError, match="nowhere"):
        run(plan(work / "nowhere", work))


def test_command_writes_json_and_markdown(
    texture_set: Path,
    work: Path,
    result: dict[str, Any],
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    json_file, markdown_file = tmp_path / "table.json", tmp_path / "table.md"
    code = command(
        *("accuracy", "--sets", f"{texture_set},cookies", "--settings", "3", "--seeds", 2, "--image-size", 64),
        *("--feature-cache", work / "features", "--work", work / "results", "--data-folder", tmp_path / "none"),
        *("--json", json_file, "--markdown", markdown_file),
    )
    assert code == 0
    written = json.loads(json_file.read_text())
    assert written["rows"] == [row for row in result["rows"] if (row["label"], row["shots"]) == ("meliad", 3)][:1]
    assert written["command"].startswith("python -m meliad_edge.benchmarks accuracy --sets")
    assert written["environment"]["cores"] >= 1
    absent = tmp_path / "none" / "aws_cookies"
    assert written["left_out"] == [f"cookies: no folder {absent}; name another with --data-folder"]
    captured = capsys.readouterr()
    assert captured.out == markdown_file.read_text()
    assert f"saved      {json_file}" in captured.err


def test_ablation_has_a_row_for_each_part(
    texture_set: Path, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without labels the reconstruction is not trained: its rows say why, in a moment."""
    json_file = tmp_path / "ablation.json"
    code = command(
        *("ablation", "--sets", texture_set, "--settings", "0", "--seeds", 1, "--image-size", 64, "--json", json_file),
        *("--work", tmp_path / "results", "--feature-cache", tmp_path / "features"),
    )
    assert code == 0
    written = json.loads(json_file.read_text())
    assert written["benchmark"] == "ablation"
    assert [(row["label"], row["options"]) for row in written["rows"]] == [(v.label, v.options) for v in ABLATIONS]
    assert len(list((tmp_path / "results").iterdir())) == len(ABLATIONS)
    not_run = [variant for variant in ABLATIONS if variant.detector == "meliad-reconstruction"]
    assert capsys.readouterr().out.count("not run: ") == len(not_run)


def test_bad_data_set_is_one_line(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("accuracy", "--sets", tmp_path / "nowhere", "--work", tmp_path) == DataError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error      data set {tmp_path / 'nowhere'} does not exist")


def test_what_cannot_be_run_is_kept_only_where_it_will_always_be_so(
    texture_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(job: Job) -> tuple[dict[str, Any], bool]:
        file = tmp_path / job.file_name()
        return run_and_keep(job, file, None), file.is_file()

    job = Job("metal", str(texture_set), "meliad-reconstruction", shots=0, seed=0, image_size=64)
    result, is_kept = kept(job)
    assert "labelled defects" in result["not_run"]
    assert is_kept
    result, is_kept = kept(replace(job, shots=100))
    assert result["not_run"].startswith("100 shots were asked for")
    assert not is_kept
    monkeypatch.setattr("meliad_edge.benchmarks.job.evaluate", None)
    result, is_kept = kept(replace(job, shots=2, options={"steps": 1}))
    assert result["not_run"].startswith("TypeError"), "an error that nobody foresaw is a row too"
    assert not is_kept


def test_changed_sources_stop_the_benchmark(texture_set: Path, tmp_path: Path) -> None:
    job = Job("metal", str(texture_set), "meliad", shots=2, seed=0)
    with pytest.raises(MeliadError, match="changed while the benchmark ran"):
        run_and_keep(job, tmp_path / job.file_name().replace(".json", "0.json"), None)
