"""How far from the bare backbone: frame to decision, and frame to decision through ``watch``, in one run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from meliad_edge import __version__
from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.benchmarks.sample_model import sample_model
from meliad_edge.bundle import Manifest, write_bundle
from meliad_edge.calibrate import calibrate
from meliad_edge.export.graph import export_bare_backbone, export_graph
from meliad_edge.models.backbone import DEFAULT_BACKBONE, load_backbone
from meliad_edge.models.network import DetectorNetwork
from meliad_edge.precision import DEFAULT_LIMITS
from meliad_edge.progress import track
from meliad_edge.runtime.load import load_predictor
from meliad_edge.runtime.predictor import Predictor
from meliad_edge.stream.sources import open_source
from meliad_edge.stream.uri import parse_source
from meliad_edge.stream.watcher import Watcher

SIZE = 256
FRAME_HW = (480, 640)
_ROUNDS = 12
_FRAMES_PER_ROUND = 20


def run(rounds: int = _ROUNDS) -> dict[str, Any]:
    """Time the bare backbone, ``predict`` and ``watch`` in turn, round after round, and compare medians.

    The model is the default detector, fitted on real images where the extra demo is installed, and its frames are
    images it has not seen, enlarged to 640 x 480. The bare backbone gets them at model size, already in memory.

    Args:
        rounds: Rounds of 20 frames for each of the three.

    Returns:
        JSON values: median milliseconds of each, the ratios of the medians to the bare backbone, and the environment.
    """
    model = sample_model(SIZE)
    network = model.network
    frames = [cv2.resize(frame, FRAME_HW[::-1]).astype(np.uint8) for frame in model.frames[:_FRAMES_PER_ROUND]]
    with tempfile.TemporaryDirectory(prefix="meliad-limit-") as name:
        folder = Path(name)
        predictor = _predictor(network, folder / "limit.meliad")
        video = _write_video(frames, folder / "frames.avi")
        bare = ort.InferenceSession(
            export_bare_backbone(load_backbone(), network.input_hw).SerializeToString(),
            _quiet_options(),
            providers=["CPUExecutionProvider"],
        )
        small = model.frames[:1]
        samples_s: dict[str, list[float]] = {"backbone": [], "predict": [], "watch": []}
        _time_backbone(bare, small), _time_predict(predictor, frames), _time_watch(predictor, video)  # warm-up
        for _ in track(range(rounds), "rounds"):
            samples_s["backbone"] += _time_backbone(bare, small)
            samples_s["predict"] += _time_predict(predictor, frames)
            samples_s["watch"].append(_time_watch(predictor, video))
    median_ms = {key: 1e3 * float(np.median(values)) for key, values in samples_s.items()}
    return {
        "benchmark": "limit",
        "engine": predictor.engine.name,
        "data": model.data,
        "backbone": DEFAULT_BACKBONE,
        "input_hw": [SIZE, SIZE],
        "frame_hw": list(FRAME_HW),
        "rounds": rounds,
        "median_ms": median_ms,
        "fp32_over_backbone": median_ms["predict"] / median_ms["backbone"],
        "watch_over_backbone": median_ms["watch"] / median_ms["backbone"],
        "environment": describe_environment(),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as lines for people."""
    median_ms = result["median_ms"]
    return [
        ("backbone", f"{median_ms['backbone']:.2f} ms   {result['backbone']} alone in ONNX Runtime, {SIZE} pixels"),
        (
            "predict",
            f"{median_ms['predict']:.2f} ms   {result['fp32_over_backbone']:.3f} x   frame in memory to decision",
        ),
        (
            "watch",
            f"{median_ms['watch']:.2f} ms   {result['watch_over_backbone']:.3f} x   the same while decoding a video",
        ),
        ("engine", result["engine"]),
    ]


def _predictor(network: DetectorNetwork, path: Path) -> Predictor:
    manifest = Manifest(
        name="limit",
        detector="meliad",
        backbone=DEFAULT_BACKBONE,
        input_hw=network.input_hw,
        grid_hw=network.grid_hw,
        top_cells=network.top_cells,
        precisions={"fp32": DEFAULT_LIMITS["fp32"]},
        created_by=f"meliad-edge {__version__}",
        dataset="benchmark",
        licence="none",
        train_normals=100,
        shots=10,
    )
    # A threshold no frame reaches: regions are drawn on alarms alone, and alarms are rare.
    write_bundle(path, manifest, {"fp32": export_graph(network).SerializeToString()}, calibrate([1e6]), (), ())
    return load_predictor(path)


def _write_video(frames: list[NDArray[np.uint8]], path: Path) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, FRAME_HW[::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def _quiet_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return options


def _time_backbone(session: ort.InferenceSession, frame: NDArray[np.uint8]) -> list[float]:
    times_s = []
    for _ in range(_FRAMES_PER_ROUND):
        start = time.perf_counter()
        session.run(None, {"frames": frame})
        times_s.append(time.perf_counter() - start)
    return times_s


def _time_predict(predictor: Predictor, frames: list[NDArray[np.uint8]]) -> list[float]:
    times_s = []
    for frame in frames:
        start = time.perf_counter()
        predictor.predict(frame)
        times_s.append(time.perf_counter() - start)
    return times_s


def _time_watch(predictor: Predictor, video: Path) -> float:
    """Median time from frame to decision of one pass over the video."""
    watcher = Watcher(
        predictor,
        [open_source(parse_source(str(video)))],
        on_event=lambda event: None,
        on_notice=lambda name, text: None,
        on_failure=_raise,
    )
    watcher.run()
    return watcher.summary().latencies["frame_to_decision"].p50_s


def _raise(name: str, error: Exception) -> None:
    raise error
