from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from meliad_edge.bundle import Manifest, open_bundle, write_bundle
from meliad_edge.calibrate import calibrate, move_threshold
from meliad_edge.device_threshold import LiveThreshold, set_threshold, threshold_file, with_device_threshold
from meliad_edge.errors import BundleError, UsageError
from meliad_edge.precision import DEFAULT_LIMITS


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A bundle whose calibration scores are 60, 80 and 100."""
    manifest = Manifest(
        name="line3", detector="test", backbone="none", input_hw=(32, 32), grid_hw=(4, 4), top_cells=1,
        precisions={"fp32": DEFAULT_LIMITS["fp32"]}, created_by="tests", dataset="none", licence="none",
        train_normals=3, shots=1,
    )  # fmt: skip
    file = tmp_path / "line3.meliad"
    write_bundle(file, manifest, {"fp32": b""}, calibrate([60.0, 80.0, 100.0]), [], [])
    return file


def test_the_device_decides_at_its_own_threshold_and_the_bundle_stays(file: Path, invoke: Callable[..., Any]) -> None:
    before = file.read_bytes()
    shipped = open_bundle(file).calibration
    outcome = invoke("threshold", file, "--value", "70", "--json")
    assert outcome.code == 0, outcome.err
    assert (outcome.json["threshold"], outcome.json["bundle_threshold"]) == (70.0, shipped.threshold)
    assert file.read_bytes() == before
    device = with_device_threshold(open_bundle(file), file).calibration
    assert device.threshold == 70.0
    assert device.guaranteed_false_alarm_rate == 0.75  # two of three calibration images alarm, and one more may
    assert invoke("threshold", file, "--reset").code == 0
    assert with_device_threshold(open_bundle(file), file).calibration == shipped
    assert sorted(path.name for path in file.parent.iterdir()) == ["line3.meliad"]


def test_a_rate_is_met_with_the_scores_in_the_bundle(file: Path) -> None:
    bundle = open_bundle(file)
    expected = calibrate([60.0, 80.0, 100.0], target_false_alarm_rate=0.5)
    assert set_threshold(bundle, file, false_alarm_rate=0.5) == expected
    assert with_device_threshold(bundle, file).calibration == expected


def test_moving_counts_what_would_have_alarmed() -> None:
    calibration = calibrate(list(range(1, 100)))
    assert move_threshold(calibration, 1000.0).guaranteed_false_alarm_rate == 0.01
    assert move_threshold(calibration, 50.5).guaranteed_false_alarm_rate == 0.5
    assert move_threshold(calibration, -1.0).guaranteed_false_alarm_rate == 1.0
    assert move_threshold(calibration, calibration.threshold).upper_bound == calibration.upper_bound


@pytest.mark.parametrize(
    "arguments",
    [(), ("--value", "1", "--false-alarm-rate", "0.1"), ("--value", "nan"), ("--false-alarm-rate", "1.5"),
     ("--reset", "--value", "1")],
)  # fmt: skip
def test_what_cannot_be_asked_for(arguments: tuple[str, ...], file: Path, invoke: Callable[..., Any]) -> None:
    assert invoke("threshold", file, *arguments).code == 2
    assert not threshold_file(file).exists()


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"threshold": NaN}', "x" * 100_000])
def test_a_damaged_file_is_named_and_never_passed_over(text: str, file: Path) -> None:
    threshold_file(file).write_text(text)
    with pytest.raises(BundleError, match="not a threshold of meliad-edge; set it again") as caught:
        with_device_threshold(open_bundle(file), file)
    assert "\n" not in str(caught.value)


def test_the_threshold_of_another_bundle_is_refused(file: Path, invoke: Callable[..., Any]) -> None:
    with pytest.raises(UsageError):
        set_threshold(open_bundle(file), file)
    set_threshold(open_bundle(file), file, value=70.0)
    fields = json.loads(threshold_file(file).read_text()) | {"manifest_sha256": "0" * 64}
    threshold_file(file).write_text(json.dumps(fields))
    outcome = invoke("watch", file, file.parent)
    assert outcome.code == 5
    assert "belongs to another bundle than line3.meliad" in outcome.error_line


class Deciding:
    """Has a bundle, as a predictor does."""

    def __init__(self, file: Path) -> None:
        self.bundle = open_bundle(file)


def test_a_threshold_moves_while_frames_are_decided_and_stays_after_a_restart(file: Path) -> None:
    predictor = Deciding(file)
    live = LiveThreshold(predictor, file)
    assert live.preview(value=70.0).threshold == 70.0
    assert live.calibration == live.shipped, "a preview changes nothing"
    moved = live.move(value=70.0)
    assert predictor.bundle.calibration == live.calibration == moved
    again = Deciding(file)
    again.bundle = with_device_threshold(again.bundle, file)
    restarted = LiveThreshold(again, file)
    assert (restarted.calibration, restarted.shipped) == (moved, live.shipped)
    assert restarted.move(false_alarm_rate=0.5) == calibrate([60.0, 80.0, 100.0], target_false_alarm_rate=0.5)
    assert restarted.reset() == live.shipped
    assert not threshold_file(file).exists()


def test_those_who_move_a_threshold_at_once_do_not_mix(file: Path) -> None:
    live = LiveThreshold(Deciding(file), file)
    with ThreadPoolExecutor(8) as people:
        for _ in people.map(lambda value: live.move(value=value), [float(value) for value in range(200)]):
            assert with_device_threshold(open_bundle(file), file)
    assert with_device_threshold(open_bundle(file), file).calibration == live.calibration
