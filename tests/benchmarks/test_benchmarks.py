from __future__ import annotations

from pathlib import Path

import cv2
import pytest

from meliad_edge.benchmarks import archive, kernel, limit, startup
from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.errors import UsageError
from meliad_edge.runtime.kernel_library import find_kernel_library


def test_limit_compares_with_the_bare_backbone() -> None:
    result = limit.run(rounds=1)
    for precision in ("fp32", "int8"):
        ratio = result["median_ms"][f"predict_{precision}"] / result["median_ms"]["backbone"]
        assert result[f"{precision}_over_backbone"] == pytest.approx(ratio)
        camera = result["median_ms"][f"camera_{precision}"] / result["median_ms"]["backbone"]
        assert result[f"camera_{precision}_over_backbone"] == pytest.approx(camera)
    assert result["watch_over_backbone"] > 0.0
    assert result["streams_over_engine"] > 0.0
    assert [topic for topic, _ in limit.describe(result)] == [
        "backbone", "fp32", "fp32", "int8", "int8", "watch", "streams", "engine", "preprocess", "product",
    ]  # fmt: skip


def test_startup_is_measured_beyond_the_libraries() -> None:
    result = startup.run(runs=1)
    assert 0.0 < result["python_s"] < result["help_s"]
    assert result["import_s"] > 0.0
    # A model is loaded and a video decoded in both; the libraries alone need less than either.
    assert result["libraries_mb"] < result["bare_mb"] < result["watch_mb"]
    assert [topic for topic, _ in startup.describe(result)] == ["help", "import", "watch"]


def test_environment_says_where_a_figure_comes_from() -> None:
    environment = describe_environment()
    assert environment["cores"] >= 1
    assert environment["packages"]["onnxruntime"]
    assert environment["date"].endswith("Z")


def test_kernel_is_compared_with_what_it_replaces(tmp_path: Path) -> None:
    if find_kernel_library() is None:
        pytest.skip("no libmeliad_ort.so: installing it needs a C++ compiler and ONNX Runtime headers")
    result = kernel.run(rounds=1, patches=(64, 256))
    assert [size["patches"] for size in result["sizes"]] == [64, 256]
    for size in result["sizes"]:
        assert size["speedup"] == pytest.approx(size["body_ms"] / size["kernel_ms"])
        assert size["over_product"] == pytest.approx(size["kernel_ms"] / size["product_ms"])
    memory = result["peak_memory"]
    # The kernel never holds the distances of all patches to all prototypes; the function body does.
    assert memory["kernel_mb"] < memory["matrix_mb"]
    assert {"shape", "linear", "share", "memory"} <= {topic for topic, _ in kernel.describe(result)}
    kernel.plot(result, tmp_path / "kernel.png")
    image = cv2.imread(str(tmp_path / "kernel.png"))
    assert image is not None
    assert image.shape[0] > 300


def test_without_a_kernel_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MELIAD_EDGE_KERNEL", "off")
    with pytest.raises(UsageError, match="meliad-edge doctor says how to build it"):
        kernel.run(rounds=1)


def test_archive_compares_with_a_bare_loop() -> None:
    result = archive.run(images=40)
    runs = result["runs"]
    assert runs.keys() == {"bare", "one", "bare_again", "two", "one_few"}
    assert all(one["seconds"] > 0.1 and one["core_seconds"] > 0.1 and one["peak_mb"] > 50.0 for one in runs.values())
    assert runs["two"]["core_seconds"] > runs["one_few"]["core_seconds"]
    assert {topic for topic, _ in archive.describe(result)} >= {"overhead", "workers", "memory", "bare"}
