from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meliad_edge.benchmarks import limit
from meliad_edge.benchmarks.environment import describe_environment


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meliad_edge.benchmarks", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_accuracy_gives_mean_and_spread_over_seeds(texture_set: Path, tmp_path: Path) -> None:
    file = tmp_path / "accuracy.json"
    done = _run("accuracy", "--data", texture_set, "--shots", 3, "--seeds", 2, "--json", file)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    aurocs = [seed["image_auroc"] for seed in result["per_seed"]]
    assert [seed["seed"] for seed in result["per_seed"]] == [0, 1]
    assert result["mean"]["image_auroc"] == pytest.approx(sum(aurocs) / 2)
    assert set(result["mean"]) >= {"image_auroc", "image_ap", "pixel_auroc", "aupro_30"}
    assert result["command"].startswith("python -m meliad_edge.benchmarks accuracy")


def test_limit_compares_with_the_bare_backbone() -> None:
    result = limit.run(rounds=1)
    assert result["fp32_over_backbone"] == pytest.approx(
        result["median_ms"]["predict"] / result["median_ms"]["backbone"]
    )
    assert result["watch_over_backbone"] > 0.0
    assert {topic for topic, _ in limit.describe(result)} == {"backbone", "predict", "watch", "engine"}


def test_a_bad_data_set_is_one_line(tmp_path: Path) -> None:
    done = _run("accuracy", "--data", tmp_path / "nowhere")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_environment_says_where_a_figure_comes_from() -> None:
    environment = describe_environment()
    assert environment["cores"] >= 1
    assert environment["packages"]["onnxruntime"]
    assert environment["date"].endswith("Z")
