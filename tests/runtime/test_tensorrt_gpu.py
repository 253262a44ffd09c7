"""The whole way on a real GPU with a real TensorRT: build, load, compare, time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meliad_edge.bundle import Bundle, open_bundle
from meliad_edge.errors import MeliadError
from meliad_edge.parity import check_golden
from meliad_edge.precision import Precision
from meliad_edge.runtime.cuda import Device
from meliad_edge.runtime.load import load_engine, load_tensorrt_engine
from meliad_edge.runtime.tensorrt_build import open_tensorrt
from meliad_edge.runtime.tensorrt_engine import TensorRtEngine

pytestmark = [pytest.mark.gpu, pytest.mark.workshop]

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


@pytest.fixture(scope="module")
def gpu() -> None:
    """Skips where there is no GPU, PyCUDA or TensorRT."""
    try:
        Device()
        open_tensorrt()
    except MeliadError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bundle(gpu: None, run_folder: Path, invoke: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with an engine in each precision beside it."""
    path = tmp_path_factory.mktemp("gpu") / "metal.meliad"
    outcome = invoke("export", run_folder, "--out", path, "--precision", "fp16")
    assert outcome.code == 0, outcome.err
    for precision in PRECISIONS:
        outcome = invoke("build", path, "--precision", precision, "--max-batch", 4)
        assert outcome.code == 0, outcome.err
    return open_bundle(path)


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> Precision:
    chosen: Precision = request.param
    return chosen


@pytest.fixture
def engine(bundle: Bundle, precision: Precision) -> Iterator[TensorRtEngine]:
    engine = load_tensorrt_engine(bundle, precision)
    yield engine
    engine.close()


def test_it_decides_as_the_bundle_says(bundle: Bundle, precision: Precision, engine: TensorRtEngine) -> None:
    result = check_golden(bundle, engine, precision)
    assert result.passed, result
    print(f"\n{engine.name} {precision}: score error {result.score_error:.3%}, map error {result.map_error:.3%}")


def test_batches_score_as_in_onnx_runtime(bundle: Bundle, precision: Precision, engine: TensorRtEngine) -> None:
    reference = load_engine(bundle, precision)
    unit, limits = bundle.calibration.spread, bundle.manifest.precisions[precision]
    golden = np.stack([frame.frame for frame in bundle.golden])
    for count in (1, 1, 3, 4, 4, len(golden)):
        result, expected = engine.infer(golden[:count]), reference.infer(golden[:count])
        assert np.abs(result.score - expected.score).max() <= limits.score * unit
        assert np.abs(result.map - expected.map).max() <= limits.map * unit


def test_a_steady_stream_is_one_cuda_graph(bundle: Bundle, precision: Precision, engine: TensorRtEngine) -> None:
    frame = bundle.golden[0].frame[np.newaxis]
    first = engine.infer(frame)
    for _ in range(20):
        result = engine.infer(frame)
    assert engine.has_cuda_graph
    assert np.array_equal(result.score, first.score)
    samples = []
    for _ in range(200):
        start = time.perf_counter()
        engine.infer(frame)
        samples.append(time.perf_counter() - start)
    p50, p99 = 1e3 * np.percentile(samples, (50, 99))
    print(f"\n{engine.name} {precision}, one frame of {engine.input_size_hw}: p50 {p50:.3f} ms, p99 {p99:.3f} ms")


def test_a_copy_of_the_bundle_needs_an_engine_of_its_own(bundle: Bundle, tmp_path: Path, invoke: Any) -> None:
    copy = tmp_path / "copy.meliad"
    shutil.copy(bundle.path, copy)
    outcome = invoke("predict", copy, "none.png", "--engine", "tensorrt")
    assert outcome.code == 10
    assert "no such file" in outcome.error_line
