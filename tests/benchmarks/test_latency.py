"""``bench``: windows until they agree, honest warnings, batches; two reports compared; a page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meliad_edge.benchmarks import latency
from meliad_edge.benchmarks.compare import LatencyRecord, compare_reports, read_report, require_no_regression
from meliad_edge.bundle import open_bundle
from meliad_edge.device.telemetry import Telemetry
from meliad_edge.errors import RegressionError, UsageError

STAGES = ["capture", "decode", "preprocess", "infer", "score", "post", "total"]


def report(blocks_ms: list[float], **changes: Any) -> dict[str, Any]:
    """What bench prints, as far as it is compared: a total of these medians, of which capture is a hundredth."""
    blocks = {"capture": [1e-5 * value for value in blocks_ms], "total": [1e-3 * value for value in blocks_ms]}
    return {
        "schema_version": 1,
        "model_sha256": "a" * 64,
        "engine": "onnxruntime-cpu",
        "precision": "fp32",
        "threads": 1,
        "frame_hw": [480, 640],
        "stages": {stage: {"p50_s": float(np.median(values))} for stage, values in blocks.items()},
        "block_p50_s": blocks,
        "is_stable": True,
        "environment": {"cpu": "a processor", "cores": 2},
        **changes,
    }


def noisy(median_ms: float, seed: int, spread: float = 0.01) -> list[float]:
    return list(median_ms * np.random.default_rng(seed).normal(1.0, spread, 20))


def compared(before: dict[str, Any], after: dict[str, Any], tolerance: float = 0.05) -> dict[str, str]:
    result = compare_reports(LatencyRecord(**before), LatencyRecord(**after), tolerance)
    return {stage.stage: stage.verdict for stage in result.stages}


def test_what_is_more_than_chance_has_a_verdict() -> None:
    before = report(noisy(10.0, 1))
    assert compared(before, report(noisy(10.0, 2)))["total"] == "no difference seen"
    assert compared(before, report(noisy(10.3, 3)))["total"] == "slower, within the tolerance"
    assert compared(before, report(noisy(12.0, 4)))["total"] == "slower"
    assert compared(before, report(noisy(9.0, 5)))["total"] == "faster"
    # The same difference drowns in more noise.
    assert compared(report(noisy(10.0, 8, 0.4)), report(noisy(10.3, 9, 0.4)))["total"] == "no difference seen"


@pytest.mark.parametrize("seed", range(5))
def test_equal_machines_are_no_regression(seed: int) -> None:
    first, second = (report(noisy(10.0, 100 * seed + offset, 0.05)) for offset in (1, 2))
    assert compared(first, second)["total"] != "slower"


def test_a_regression_is_refused_with_the_figures() -> None:
    result = compare_reports(LatencyRecord(**report(noisy(10.0, 1))), LatencyRecord(**report(noisy(13.0, 2))), 0.05)
    assert not result.passed
    with pytest.raises(RegressionError, match=r"^total became slower by more than 5%: total 1\d\.\d+ ms, now 1[23]"):
        require_no_regression(result)
    require_no_regression(
        compare_reports(LatencyRecord(**report(noisy(10.0, 1))), LatencyRecord(**report(noisy(13.0, 2))), 0.5)
    )


def test_a_stage_too_short_to_matter_does_not_fail() -> None:
    after = report(noisy(10.0, 2))
    after["block_p50_s"]["capture"] = [3 * value for value in after["block_p50_s"]["capture"]]
    result = compare_reports(LatencyRecord(**report(noisy(10.0, 1))), LatencyRecord(**after), 0.05)
    assert {stage.stage: (stage.verdict, stage.counts) for stage in result.stages}["capture"] == ("slower", False)
    assert result.passed


def with_engine(total_ms: list[float], score_share: float) -> dict[str, Any]:
    """A report whose engine takes nine tenths of the total, divided by a profile."""
    made = report(total_ms)
    for stage, share in (("infer", 1.0 - score_share), ("score", score_share)):
        blocks = [0.9 * share * value for value in made["block_p50_s"]["total"]]
        made["block_p50_s"][stage] = blocks
        made["stages"][stage] = {"p50_s": float(np.median(blocks))}
    return made


def test_another_division_of_the_same_time_of_the_engine_is_no_regression() -> None:
    before, after = with_engine(noisy(10.0, 1), 0.100), with_engine(noisy(10.0, 2), 0.115)
    assert compared(before, after)["score"] == "slower"
    assert compared(before, after)["engine"] == "no difference seen"
    require_no_regression(compare_reports(LatencyRecord(**before), LatencyRecord(**after), 0.05))
    slower = compare_reports(LatencyRecord(**before), LatencyRecord(**with_engine(noisy(12.0, 2), 0.100)), 0.05)
    assert {stage.stage for stage in slower.regressions} == {"engine", "total"}


def test_what_else_differs_is_said() -> None:
    after = report(noisy(10.0, 2), precision="int8", is_stable=False, environment={"cpu": "another", "cores": 2})
    differences = compare_reports(LatencyRecord(**report(noisy(10.0, 1))), LatencyRecord(**after), 0.05).differences
    assert [difference.partition(":")[0] for difference in differences] == [
        "precision differs",
        "another machine",
        "the report after says of itself that it should not be quoted",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "no report of bench (schema_version: field required)"),
        ("[1", "no report of bench (the file: invalid json"),
        (json.dumps(report([1.0, 2.0], schema_version=9)), "schema_version"),
        (json.dumps(report([1.0])), "capture has 1 usable blocks"),
        (json.dumps(report([1.0, 2.0])).replace('"total"', '"other"'), "it has no total"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_report(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="No such file"):
        read_report(tmp_path / "none.json")


def test_two_measurements_are_compared_on_the_command_line(bundle_file: Path, invoke: Any, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("first.json", "second.json")]
    for file in files:
        outcome = invoke("bench", bundle_file, "--json", "--frames", 60, "--threads", 1)
        assert outcome.code == 0, outcome.err
        file.write_text(outcome.out)
    outcome = invoke("bench", "compare", *files, "--tolerance", 9, "--json")
    assert outcome.code == 0, outcome.err
    assert [stage["stage"] for stage in outcome.json["stages"]] == [
        *STAGES[: STAGES.index("infer")], "engine", *STAGES[STAGES.index("infer") :]
    ]  # fmt: skip
    assert all(stage["low"] <= stage["high"] for stage in outcome.json["stages"])
    slower = json.loads(files[1].read_text())
    for stage, blocks in slower["block_p50_s"].items():
        slower["block_p50_s"][stage] = [50.0 * value for value in blocks]
        slower["stages"][stage]["p50_s"] *= 50.0
    files[1].write_text(json.dumps(slower))
    outcome = invoke("bench", "compare", *files)
    assert outcome.code == RegressionError.exit_code
    assert "became slower by more than 5%" in outcome.err.splitlines()[-1]


class TestWindows:
    """Each window's frames take as long as told."""

    @pytest.fixture
    def measure(self, bundle_file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        def measure(window_ms: list[float], **options: Any) -> latency.LatencyReport:
            told = iter(window_ms)

            def window(predictor: Any, files: Any, size: int, advance: Any) -> dict[str, list[float]]:
                seconds = 1e-3 * next(told)
                return {
                    stage: [seconds if stage == "total" else 0.1 * seconds] * size
                    for stage in STAGES
                    if stage != "score"
                }

            monkeypatch.setattr(latency, "_measure_window", window)
            monkeypatch.setattr(latency, "_score_share", lambda *_: 0.25)
            return latency.measure_latency(open_bundle(bundle_file), "fp32", frames=30, **options)

        return measure

    def test_three_that_agree_are_enough(self, measure: Any) -> None:
        measured = measure([5.0, 5.1, 5.2, 99.0])
        assert (measured.windows, measured.settled, measured.warnings) == (3, True, ())
        assert measured.stages["total"].count == 30
        assert measured.stages["infer"].p50_s + measured.stages["score"].p50_s == pytest.approx(0.51e-3)

    def test_the_report_is_of_the_last_three(self, measure: Any) -> None:
        measured = measure([50.0, 20.0, 5.0, 5.1, 5.2, 99.0])
        assert (measured.windows, measured.settled) == (5, True)
        assert measured.stages["total"].p50_s == pytest.approx(5.1e-3)
        assert max(measured.total_s) < 6e-3

    def test_ten_are_the_most_and_the_report_says_that_they_do_not_agree(self, measure: Any) -> None:
        measured = measure([float(value) for value in range(1, 30)])
        assert (measured.windows, measured.settled, measured.is_stable) == (10, False, False)
        assert any("medians of the last 3 of 10 windows" in warning for warning in measured.warnings)

    def test_deadlines_that_were_missed_are_counted(self, measure: Any) -> None:
        measured = measure([5.0, 5.1, 5.2], deadline_s=5.15e-3)
        assert measured.deadline_misses == 10
        assert measure([5.0, 5.1, 5.2]).deadline_misses is None

    def test_a_clock_that_fell_and_a_processor_that_throttled_are_named(
        self, measure: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        readings = iter(Telemetry(float(i), 2000.0 - 400.0 * i, 60.0, 5 + i, 10.0 * i, None) for i in range(4))
        monkeypatch.setattr(latency, "read_telemetry", lambda: next(readings))
        measured = measure([5.0, 5.1, 5.2])
        assert [warning.partition(" ")[0] for warning in measured.warnings] == ["the", "the"]
        assert "from 2000 to 800 MHz" in measured.warnings[0]
        assert "slowed itself down" in measured.warnings[1]
        assert measured.energy_per_frame_j == pytest.approx(1.0)


def test_batches_and_deadline_on_the_command_line(bundle_file: Path, invoke: Any) -> None:
    options = ("--frames", 12, "--batches", "1,3", "--deadline-ms", 0.001, "--json")
    outcome = invoke("bench", "measure", bundle_file, *options)
    assert outcome.code == 0, outcome.err
    assert [batch["batch"] for batch in outcome.json["batches"]] == [1, 3]
    assert all(batch["frames_per_s"] > 0.0 for batch in outcome.json["batches"])
    assert outcome.json["deadline_misses"] == outcome.json["stages"]["total"]["count"] == 12
    assert "12 of 12 frames took longer than 0.001 ms" in outcome.err


@pytest.mark.parametrize("text", ["", "0", "1,,2", "a", "1000", "300"])
def test_batches_that_make_no_sense(text: str, bundle_file: Path, invoke: Any) -> None:
    outcome = invoke("bench", bundle_file, "--batches", text)
    assert outcome.code == 2
    assert "--batches takes numbers between 1 and 256" in outcome.err


@pytest.mark.workshop
def test_the_page_shows_stages_spread_and_course(bundle_file: Path, invoke: Any, tmp_path: Path) -> None:
    page = tmp_path / "bench.html"
    outcome = invoke("bench", bundle_file, "--frames", 30, "--report", page, "--json")
    assert outcome.code == 0, outcome.err
    text = page.read_text()
    assert set(re.findall(r'<th scope="row"><bdi>(\w+)</bdi>', text)) == set(STAGES)
    assert text.count("<svg") == 2
    assert "30 frames of 640 x 480 pixels" in text
    for path in re.findall(r'<path class="[a-z]+" d="([^"]+)"', text):
        assert "nan" not in path
        assert "inf" not in path


@pytest.mark.workshop
def test_limit_measures_the_backbone_of_a_bundle(precise_bundle: Path, invoke: Any) -> None:
    outcome = invoke("bench", "limit", precise_bundle, "--rounds", 1, "--threads", 1, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    for precision in ("fp32", "int8"):
        ratio = result["median_ms"][f"predict_{precision}"] / result["median_ms"]["backbone"]
        assert result[f"{precision}_over_backbone"] == pytest.approx(ratio)
    assert {"copy", "product", "watch"} <= result["median_ms"].keys()
    assert invoke("bench", "limit", precise_bundle, "--rounds", 1).out.startswith("backbone ")
