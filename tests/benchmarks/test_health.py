from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from meliad_edge.benchmarks import drift, health
from meliad_edge.errors import DataError


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(8):
        image = np.full((240, 320, 3), 100, np.uint8)
        for _ in range(300):
            x, y, side = rng.integers(0, (320, 240, 40)).tolist()
            cv2.rectangle(image, (x, y), (x + side, y + side), (int(rng.integers(30, 220)),) * 3, -1)
        (tmp_path / "aws_cookies").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "aws_cookies" / f"{number}.png"), image)
    return tmp_path


def test_health_counts_scenes_and_frames(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = {name: case for name, case in health.cases().items() if name in ("one flash", "covered")}
    monkeypatch.setattr(health, "cases", lambda: some)
    result = health.run(1, data_folder, groups=["development"])
    said = result["said"]["development"]
    assert said["one flash"]["words"] == {"": 1}
    assert said["one flash"]["unfit_frames"] == 1
    assert said["covered"]["words"] == {"black": 1}
    assert said["covered"]["unfit_frames"] == said["covered"]["frames"]
    assert 0.0 < result["cost_ms"]["median"] <= result["cost_ms"]["longest"]
    lines = health.describe(result)
    assert ("development", "covered            expected black        reported black 1; unfit 60 of 60 frames") in lines


def test_health_needs_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs pictures of magnetic_tile, aws_cookies; found 0"):
        health.run(1, tmp_path, groups=["development"])


def test_drift_counts_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "_CALIBRATIONS", (200,))
    monkeypatch.setattr(drift, "_GOOD_SAMPLES", 500)
    result = drift.run(lines=2)
    assert [row["distribution"] for row in result["rows"]] == ["normal", "gamma"]
    for row in result["rows"]:
        assert row["false_alarms"] == 0
        assert row["lower_after_300"]["found"] == 2
        assert 5 < row["lower_after_300"]["mean_samples"] < 100
    assert "200 calibration scores, 2 lines: 0 false alarms" in drift.describe(result)[0][1]
