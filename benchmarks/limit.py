"""How far from the bare backbone: frame to decision, and frame to decision through ``watch``, in one run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.benchmarks.sample_model import sample_bundle, sample_model, write_video
from meliad_edge.bundle import Bundle, require_golden
from meliad_edge.errors import UsageError
from meliad_edge.export.graph import export_bare_backbone
from meliad_edge.models import create_detector
from meliad_edge.models.backbone import load_backbone
from meliad_edge.precision import Precision
from meliad_edge.progress import track
from meliad_edge.runtime.load import make_predictor
from meliad_edge.runtime.predictor import Predictor
from meliad_edge.stream.sources import open_source
from meliad_edge.stream.uri import parse_source
from meliad_edge.stream.watcher import Camera, Watcher, WatchSummary

SIZE = 256
FRAME_HW = (480, 640)
_ROUNDS = 12
_FRAMES_PER_ROUND = 20
_STREAMS = 4
# ONNX Runtime's threads keep spinning for a while after a run, which would slow the next session down.
_REST_S = 0.02


def run(rounds: int = _ROUNDS, threads: int | None = None) -> dict[str, Any]:
    """Measure the default detector, fitted on real images where the extra demo is installed, in FP32 and INT8.

    Args:
        rounds: Rounds of 20 frames.
        threads: Threads of ONNX Runtime; None uses every core.

    Returns:
        What :func:`measure` does, and what the detector was fitted on.
    """
    model = sample_model(SIZE)
    with tempfile.TemporaryDirectory(prefix="meliad-limit-") as name:
        bundle = sample_bundle(model, Path(name) / "limit.meliad", ("fp32", "int8"))
        return {"benchmark": "limit", "data": model.data, **measure(bundle, rounds, threads)}


def measure(bundle: Bundle, rounds: int = _ROUNDS, threads: int | None = None) -> dict[str, Any]:
    """Time the bare backbone, a bundle from frame to decision, and ``watch`` in turn, round after round.

    ``watch`` is also timed with four videos at once and one thread for the engine, which leaves the others to decoding:
    its throughput is compared with that of the engine alone on one thread.

    Frames are the golden frames of the bundle, in memory: at model size, as the bare backbone gets them, and enlarged
    to 640 x 480, as a camera gives them; ``watch`` gets the latter. Beside them, in the same rounds, a copy of memory
    and a matrix product of the scoring's size: what no resize and no scoring in single precision can beat.

    Args:
        bundle: The model; its backbone is built anew.
        rounds: Rounds of 20 frames for each.
        threads: Threads of ONNX Runtime; None uses every core.

    Returns:
        JSON values: median milliseconds of each, and ratios of medians: ``fp32_over_backbone`` and
        ``int8_over_backbone`` of frames at model size, ``camera_fp32_over_backbone`` and ``camera_int8_over_backbone``
        of those that are resized (None where the bundle carries no INT8), ``watch_over_backbone``, and of each stage to
        its limit; ``streams_over_engine``, the share of the engine's own throughput that four videos get.

    Raises:
        BundleError: The bundle has no golden frames.
        UsageError: Its detector has no backbone.
    """
    manifest = bundle.manifest
    if manifest.backbone == "none":
        msg = f"{manifest.detector} has no pretrained backbone to compare with; measure it with bench MODEL"
        raise UsageError(msg)
    golden = [golden.frame for golden in require_golden(bundle)]
    frames = [cv2.resize(frame, FRAME_HW[::-1]).astype(np.uint8) for frame in golden]
    carried: list[Precision] = [precision for precision in ("fp32", "int8") if precision in bundle.models]
    predictors = {
        precision: make_predictor(bundle, precision=precision, engine="onnxruntime", threads=threads)
        for precision in carried
    }
    bare = ort.InferenceSession(
        export_bare_backbone(
            load_backbone(manifest.backbone, strides=create_detector(manifest.detector).strides), manifest.input_hw
        ).SerializeToString(),
        _options(threads),
        providers=["CPUExecutionProvider"],
    )
    alone = make_predictor(bundle, precision="fp32", engine="onnxruntime", threads=1)
    samples_s: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="meliad-limit-") as name:
        video = write_video([frames[index % len(frames)] for index in range(_FRAMES_PER_ROUND)], Path(name) / "v.avi")
        product = _product_operands(bundle)
        for index in track(range(rounds + 1), "rounds"):
            taken = _time_round(predictors, bare, frames, golden, video, product) | _time_streams(alone, golden, video)
            if index > 0:  # the first one warms up
                for key, values in taken.items():
                    samples_s.setdefault(key, []).extend(values)
    median_ms = {key: 1e3 * float(np.median(values)) for key, values in samples_s.items()}
    backbone_ms = median_ms["backbone"]

    def over_backbone(key: str) -> float | None:
        return median_ms[key] / backbone_ms if key in median_ms else None

    return {
        "engine": predictors["fp32"].engine.name,
        "threads": threads,
        "backbone": manifest.backbone,
        "input_hw": list(manifest.input_hw),
        "frame_hw": list(FRAME_HW),
        "rounds": rounds,
        "median_ms": median_ms,
        "fp32_over_backbone": over_backbone("predict_fp32"),
        "int8_over_backbone": over_backbone("predict_int8"),
        "camera_fp32_over_backbone": over_backbone("camera_fp32"),
        "camera_int8_over_backbone": over_backbone("camera_int8"),
        "watch_over_backbone": median_ms["watch"] / backbone_ms,
        "streams_over_engine": median_ms["infer_alone"] / median_ms["streams"],
        "engine_over_backbone": median_ms["infer_fp32"] / backbone_ms,
        "preprocess_over_copy": median_ms["preprocess_fp32"] / median_ms["copy"],
        "copy_gb_per_s": 2e-6 * FRAME_HW[0] * FRAME_HW[1] * 3 / median_ms["copy"],
        "environment": describe_environment(),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as lines for people."""
    ms = result["median_ms"]
    height, width = result["input_hw"]
    lines = [("backbone", f"{ms['backbone']:.2f} ms   {result['backbone']} alone in ONNX Runtime, {width} x {height}")]
    camera = "{} x {}".format(*reversed(result["frame_hw"]))
    for precision in ("fp32", "int8"):
        for kind, prefix, frame in (("predict", "", f"{width} x {height}"), ("camera", "camera_", camera)):
            if (ratio := result[f"{prefix}{precision}_over_backbone"]) is not None:
                took = ms[f"{kind}_{precision}"]
                lines.append((precision, f"{took:.2f} ms   {ratio:.3f} x   frame of {frame} in memory to decision"))
    lines += [
        ("watch", f"{ms['watch']:.2f} ms   {result['watch_over_backbone']:.3f} x   the same while decoding a video"),
        (
            "streams",
            f"{ms['streams']:.2f} ms   a frame of {_STREAMS} videos at once, engine on one thread: "
            f"{result['streams_over_engine']:.2f} of its own throughput",
        ),
        ("engine", f"{ms['infer_fp32']:.2f} ms   {result['engine_over_backbone']:.3f} x   {result['engine']}, fp32"),
        (
            "preprocess",
            f"{ms['preprocess_fp32']:.2f} ms   {result['preprocess_over_copy']:.1f} x a copy of the frame, at "
            f"{result['copy_gb_per_s']:.1f} GB/s",
        ),
    ]
    if "product" in ms:
        lines.append(("product", f"{ms['product']:.2f} ms   a matrix product of the scoring's size in NumPy"))
    return lines


def _product_operands(bundle: Bundle) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Random embeddings and prototypes of the size of the bundle's; None where it has no prototypes."""
    constants = {c.name: c.dims for c in onnx.load_model_from_string(bundle.models["fp32"]).graph.initializer}
    if "prototypes" not in constants:
        return None
    count, depth = constants["prototypes"]
    cells = bundle.manifest.grid_hw[0] * bundle.manifest.grid_hw[1]
    random = np.random.default_rng(0)
    return random.normal(size=(cells, depth)).astype(np.float32), random.normal(size=(depth, count)).astype(np.float32)


def _time_round(
    predictors: Mapping[Precision, Predictor],
    bare: ort.InferenceSession,
    frames: Sequence[NDArray[np.uint8]],
    golden: Sequence[NDArray[np.uint8]],
    video: Path,
    product: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
) -> dict[str, list[float]]:
    samples_s: dict[str, list[float]] = {"backbone": _time_backbone(bare, golden[0][np.newaxis])}
    for precision, predictor in predictors.items():
        camera = _time_predict(predictor, frames)
        stages = _time_predict(predictor, golden) | {"camera": camera["predict"], "preprocess": camera["preprocess"]}
        samples_s |= {f"{stage}_{precision}": values for stage, values in stages.items()}
    time.sleep(_REST_S)
    samples_s["watch"] = [_time_watch(predictors["fp32"], video)]
    target = np.empty_like(frames[0])
    samples_s["copy"] = _time_each(lambda: np.copyto(target, frames[0]))
    if product is not None:
        samples_s["product"] = _time_each(lambda: np.matmul(*product))
    return samples_s


def _time_each(action: Callable[[], object]) -> list[float]:
    times_s = []
    for _ in range(_FRAMES_PER_ROUND):
        start = time.perf_counter()
        action()
        times_s.append(time.perf_counter() - start)
    return times_s


def _options(threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    return options


def _time_backbone(session: ort.InferenceSession, frame: NDArray[np.uint8]) -> list[float]:
    time.sleep(_REST_S)
    session.run(None, {"frames": frame})
    return _time_each(lambda: session.run(None, {"frames": frame}))


def _time_predict(predictor: Predictor, frames: Sequence[NDArray[np.uint8]]) -> dict[str, list[float]]:
    """Seconds from frame to decision, and of its parts."""
    time.sleep(_REST_S)
    predictor.predict(frames[0])
    samples_s: dict[str, list[float]] = {"predict": [], "preprocess": [], "infer": [], "post": []}
    for index in range(_FRAMES_PER_ROUND):
        start = time.perf_counter()
        times = predictor.predict(frames[index % len(frames)]).times
        samples_s["predict"].append(time.perf_counter() - start)
        samples_s["preprocess"].append(times.preprocess_s)
        samples_s["infer"].append(times.infer_s)
        samples_s["post"].append(times.post_s)
    return samples_s


def _time_watch(predictor: Predictor, video: Path) -> float:
    """Median time from frame to decision of one pass over the video."""
    return _watch(predictor, [video]).latencies["frame_to_decision"].p50_s


def _time_streams(predictor: Predictor, golden: Sequence[NDArray[np.uint8]], video: Path) -> dict[str, list[float]]:
    """Seconds of the engine alone for a frame, and of ``watch`` for a frame of several videos at once."""
    time.sleep(_REST_S)
    frame = golden[0][np.newaxis]
    alone = _time_each(lambda: predictor.engine.infer(frame))
    return {"infer_alone": alone, "streams": [1.0 / _watch(predictor, [video] * _STREAMS).throughput_fps]}


def _watch(predictor: Predictor, videos: Sequence[Path]) -> WatchSummary:
    watcher = Watcher(
        predictor,
        [Camera(open_source(parse_source(str(video)))) for video in videos],
        on_event=lambda event: None,
        on_notice=lambda name, text: None,
        on_failure=_raise,
    )
    watcher.run()
    return watcher.summary()


def _raise(name: str, error: Exception) -> None:
    raise error
