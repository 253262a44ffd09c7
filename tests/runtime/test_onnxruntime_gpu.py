"""The scoring kernel in ONNX Runtime's CUDA provider, on a real GPU (onnxruntime-gpu in the place of onnxruntime)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from meliad_edge.bundle import Bundle, open_bundle
from meliad_edge.precision import Precision
from meliad_edge.runtime.kernel_library import find_kernel_library
from meliad_edge.runtime.load import load_engine
from meliad_edge.runtime.onnxruntime_engine import OUTPUT_NAMES

pytestmark = [pytest.mark.gpu, pytest.mark.workshop]


@pytest.fixture(scope="module")
def bundle(run_folder: Path, invoke: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider; install onnxruntime-gpu")
    path = tmp_path_factory.mktemp("gpu") / "metal.meliad"
    outcome = invoke("export", run_folder, "--out", path, "--precision", "fp16")
    assert outcome.code == 0, outcome.err
    return open_bundle(path)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_scores_as_on_the_cpu(bundle: Bundle, precision: Precision) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(find_kernel_library("onnxruntime")))
    # FP32 means FP32, as in the TensorRT engines.
    providers = [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    session = ort.InferenceSession(bundle.models[precision], options, providers=providers)
    if session.get_providers()[0] != "CUDAExecutionProvider":
        pytest.skip("no CUDA device that ONNX Runtime can use")
    frames = np.concatenate([np.roll([golden.frame], 7 * i, axis=2) for i, golden in enumerate(bundle.golden)])
    name = session.get_inputs()[0].name
    score, evidence, _ = session.run(list(OUTPUT_NAMES), {name: frames})
    expected = load_engine(bundle, precision).infer(frames)
    unit, limits = bundle.calibration.spread, bundle.manifest.precisions[precision]
    score_error, map_error = np.abs(score - expected.score).max() / unit, np.abs(evidence - expected.map).max() / unit
    samples = []
    for _ in range(200):
        start = time.perf_counter()
        session.run(None, {name: frames[:1]})
        samples.append(1e3 * (time.perf_counter() - start))
    print(f"\n{precision}: score error {score_error:.4%}, map error {map_error:.4%}, p50 {np.median(samples):.2f} ms")
    assert score_error <= limits.score
    assert map_error <= limits.map
