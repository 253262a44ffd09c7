"""What lower precision costs and gains: decisions and AUROC on images no export has seen, and time, in one run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.cli.output import say
from meliad_edge.config import FitConfig
from meliad_edge.data.frames import load_frames
from meliad_edge.export.engines import processor_engines
from meliad_edge.export.half import emulate_fp16
from meliad_edge.export.lower import EMULATED_HALF
from meliad_edge.export.region import layers
from meliad_edge.export.tensorrt_graph import to_tensorrt
from meliad_edge.export.to_bundle import ExportedModel, export_models, read_replay
from meliad_edge.metrics import image_metrics
from meliad_edge.parity import compare
from meliad_edge.precision import PRECISIONS, Precision
from meliad_edge.progress import track
from meliad_edge.run import Run
from meliad_edge.runtime.engine import Engine, infer_all
from meliad_edge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from meliad_edge.runtime.torch_engine import TorchEngine
from meliad_edge.train import fit

_ROUNDS = 40
_FRAMES_PER_ROUND = 5
# ONNX Runtime's threads keep spinning for a while after a run, which would slow the next session down.
_REST_S = 0.02


def run(data: str, seeds: int, feature_cache: Path) -> dict[str, Any]:
    """Fit, export in every precision, and hold all of them against the trained network on the test images.

    Args:
        data: Data set, as ``fit`` takes it; 256 x 256 pixels, ten labelled defects.
        seeds: Number of seeds.
        feature_cache: Folder with backbone features.

    Returns:
        JSON values: per seed every engine's AUROC and differences in every precision, and the ratios of times.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="meliad-precision-") as folder:
        for seed in range(seeds):
            config = FitConfig(data=data, image_size=256, seed=seed, feature_cache=feature_cache)
            fitted = fit(config, Path(folder) / str(seed), say)
            rows.append({"seed": seed, **_measure(fitted)})
    return {"benchmark": "precision", "data": data, "rows": rows, "environment": describe_environment()}


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as lines for people."""
    lines = []
    for row in result["rows"]:
        trained = f"image AUROC {row['image_auroc']:.4f} as trained, {row['test_images']} test images"
        lines.append((f"seed {row['seed']}", trained))
        for engine in row["engines"]:
            errors = f"score error {engine['score_error']:.2%}, map error {engine['map_error']:.2%}"
            lines.append(
                (
                    "",
                    f"{engine['precision']:<5} {engine['engine']:<22} AUROC {engine['image_auroc']:.4f}, "
                    f"{len(engine['label_flips'])} label flips, {errors}",
                )
            )
        for threads, ratios in row["time_over_fp32"].items():
            text = ", ".join(f"{precision} {ratio:.3f} x" for precision, ratio in ratios.items())
            lines.append(("", f"time over fp32, {threads} thread(s): {text}"))
    return lines


def _measure(fitted: Run) -> dict[str, Any]:
    exported = export_models(fitted, PRECISIONS, read_replay(fitted).replay)
    test = load_frames(fitted.split.test, fitted.network.input_hw, "reading test")
    is_anomaly = np.array([sample.is_anomaly for sample in test.samples])
    names = [sample.path.name for sample in test.samples]
    reference = infer_all(TorchEngine(fitted.network), test.frames, "pytorch")
    rows = []
    for precision, model in exported.models.items():
        for name, engine in [*_emulated(exported, precision), *((e.name, e) for e in processor_engines(model))]:
            raw = infer_all(engine, test.frames, f"{name} {precision}")
            limits = fitted.config.limits_of(precision)
            parity = compare(name, precision, reference, raw, fitted.calibration, limits, names)
            rows.append({**parity.to_dict(), "image_auroc": image_metrics(raw.score, is_anomaly).image_auroc})
    return {
        "test_images": len(names),
        "image_auroc": image_metrics(reference.score, is_anomaly).image_auroc,
        "engines": rows,
        "fp32_layers": {
            precision: [layer.layer for layer in errors if layer.precision == "fp32"]
            for precision, errors in exported.layers.items()
        },
        "time_over_fp32": {str(threads): _times(exported.models, test.frames, threads) for threads in (1, 2)},
    }


def _emulated(exported: ExportedModel, precision: Precision) -> list[tuple[str, Engine]]:
    """What a GPU would compute, in ONNX Runtime: results rounded to half precision, signed bytes around 0."""
    if precision == "fp16":
        reference = onnx.load_model_from_string(exported.models["fp32"])
        kept = [layer.layer for layer in exported.layers[precision] if layer.precision == "fp32"]
        keep_fp32 = [node for layer in layers(reference) if layer.name in kept for node in layer.nodes]
        rounded = emulate_fp16(reference, keep_fp32).SerializeToString()
        return [(EMULATED_HALF, OnnxRuntimeEngine(rounded))]
    if precision == "int8":
        return [("emulated tensorrt", OnnxRuntimeEngine(to_tensorrt(exported.models[precision])))]
    return []


def _times(models: Mapping[Precision, bytes], frames: NDArray[np.uint8], threads: int) -> dict[str, float]:
    """Ratios of median times to FP32; the graphs take turns, frame by frame of batch 1."""
    sessions: dict[str, ort.InferenceSession] = {
        precision: OnnxRuntimeEngine(model, threads=threads).session for precision, model in models.items()
    }
    samples_s: dict[str, list[float]] = {precision: [] for precision in sessions}
    for index in track(range(_ROUNDS + 1), f"times, {threads} thread(s)"):
        for precision, session in sessions.items():
            time.sleep(_REST_S)
            frame = frames[index % len(frames)][np.newaxis]
            session.run(None, {"frames": frame})
            for _ in range(_FRAMES_PER_ROUND):
                start = time.perf_counter()
                session.run(None, {"frames": frame})
                samples_s[precision].append(time.perf_counter() - start)
    first_round = _FRAMES_PER_ROUND
    median = {precision: float(np.median(values[first_round:])) for precision, values in samples_s.items()}
    return {precision: value / median["fp32"] for precision, value in median.items()}
