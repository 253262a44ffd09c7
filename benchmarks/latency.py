"""Latency of one bundle on this machine, stage by stage, as ``meliad-edge bench`` reports it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from meliad_edge.bundle import Bundle, require_golden
from meliad_edge.data.images import decode_image
from meliad_edge.data.preprocess import to_model_input
from meliad_edge.monitor.latency import LatencySummary, summarise
from meliad_edge.precision import Precision
from meliad_edge.progress import progress_bar
from meliad_edge.runtime.choice import EngineChoice
from meliad_edge.runtime.load import make_predictor
from meliad_edge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from meliad_edge.runtime.predictor import Predictor

STAGES = ("capture", "decode", "preprocess", "infer", "score", "post", "total")
WARM_UP_S = 0.2
WARM_UP_FRAMES = 10
# trtexec warns above this coefficient of variation: the figures may not be trusted.
UNSTABLE_COV = 0.025
_PROFILED_RUNS = 50
_JPEG_QUALITY = 95
_NETWORK_ENDS_WITH = {"Conv", "FusedConv", "Resize", "Upsample", "ReorderOutput"}


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """Latency of every stage of one model.

    Attributes:
        engine: What executed the model.
        precision: Of the graph it executed.
        threads: Threads of the engine; None means every core.
        frame_hw: Height and width of the JPEG frames that were decoded.
        stages: Summary per stage. ``capture`` reads the file, ``decode`` JPEG to RGB, ``preprocess`` resizes,
            ``infer`` is the network without the scoring, ``score`` the scoring node: the engine's time, split by the
            median share that ONNX Runtime's profile of a separate session gives the scoring; ``post`` threshold and
            regions, ``total`` everything from the file to the decision. Without ``score`` on another engine, whose
            ``infer`` then includes it.
        cold_start_s: From the bundle's bytes to a session that can run.
        first_frame_s: Latency of the first frame, before any warm-up.
    """

    engine: str
    precision: Precision
    threads: int | None
    frame_hw: tuple[int, int]
    stages: dict[str, LatencySummary]
    cold_start_s: float
    first_frame_s: float

    @property
    def is_stable(self) -> bool:
        """Whether the spread is small enough to quote the figures."""
        return self.stages["infer"].cov <= UNSTABLE_COV

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "is_stable": self.is_stable}


def measure_latency(
    bundle: Bundle,
    precision: Precision | None,
    *,
    engine: EngineChoice = "onnxruntime",
    frame_hw: tuple[int, int] = (480, 640),
    frames: int = 200,
    threads: int | None = None,
) -> LatencyReport:
    """Time every stage from a JPEG file to the decision.

    The golden frames of the bundle, enlarged to ``frame_hw``, are the input: real content, no invented noise.

    Args:
        bundle: The model.
        precision: Which of its graphs; None takes the default of the engine.
        engine: What executes it.
        frame_hw: Height and width of the frames.
        frames: Frames measured after the warm-up.
        threads: Threads of the engine.
    """
    start = time.perf_counter()
    predictor = make_predictor(bundle, precision=precision, engine=engine, threads=threads)
    cold_start_s = time.perf_counter() - start
    samples: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with tempfile.TemporaryDirectory(prefix="meliad-bench-") as folder:
        files = _write_frames(bundle, frame_hw, Path(folder))
        first_frame_s = _time_frame(predictor, files[0])["total"]
        _warm_up(predictor, files)
        with progress_bar() as bar:
            task = bar.add_task(f"{predictor.engine.name:<24}", total=frames, note="")
            for index in range(frames):
                for stage, seconds in _time_frame(predictor, files[index % len(files)]).items():
                    samples[stage].append(seconds)
                bar.advance(task)
        if isinstance(predictor.engine, OnnxRuntimeEngine):
            share = _score_share(bundle, predictor.precision, threads, Path(folder))
            infer = np.asarray(samples["infer"])
            samples["infer"], samples["score"] = list(infer * (1.0 - share)), list(infer * share)
    return LatencyReport(
        engine=predictor.engine.name,
        precision=predictor.precision,
        threads=threads,
        frame_hw=frame_hw,
        stages={stage: summarise(values) for stage, values in samples.items() if values},
        cold_start_s=cold_start_s,
        first_frame_s=first_frame_s,
    )


def _write_frames(bundle: Bundle, frame_hw: tuple[int, int], folder: Path) -> list[Path]:
    files = []
    for index, golden in enumerate(require_golden(bundle)):
        image = cv2.resize(golden.frame, frame_hw[::-1], interpolation=cv2.INTER_LINEAR)
        path = folder / f"{index}.jpg"
        cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        files.append(path)
    return files


def _time_frame(predictor: Predictor, file: Path) -> dict[str, float]:
    start = time.perf_counter()
    data = file.read_bytes()
    captured = time.perf_counter()
    image = decode_image(data, file.name)
    decoded = time.perf_counter()
    times = predictor.predict(image).times
    finished = time.perf_counter()
    return {
        "capture": captured - start,
        "decode": decoded - captured,
        "preprocess": times.preprocess_s,
        "infer": times.infer_s,
        "post": times.post_s,
        "total": finished - start,
    }


def _warm_up(predictor: Predictor, files: Sequence[Path]) -> None:
    deadline = time.perf_counter() + WARM_UP_S
    count = 0
    while count < WARM_UP_FRAMES or time.perf_counter() < deadline:
        _time_frame(predictor, files[count % len(files)])
        count += 1


def _score_share(bundle: Bundle, precision: Precision, threads: int | None, folder: Path) -> float:
    """Median share of the scoring in the engine's time, from ONNX Runtime's own profile of a separate session."""
    engine = OnnxRuntimeEngine(bundle.models[precision], threads=threads, profile_prefix=folder / "profile")
    frame = to_model_input(bundle.golden[0].frame, engine.input_size_hw)[np.newaxis]
    for _ in range(_PROFILED_RUNS):
        engine.infer(frame)
    events = json.loads(Path(engine.session.end_profiling()).read_text())
    return float(np.median([_share_of_run(run) for run in _runs(events)]))


def _runs(events: Sequence[dict[str, Any]]) -> Iterator[list[tuple[str, float]]]:
    """Operator types and durations of each run in a profile, in the order of execution."""
    nodes: list[tuple[str, float]] = []
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            nodes.append((event["args"]["op_name"], float(event["dur"])))
        elif event["name"] == "model_run" and nodes:
            yield nodes
            nodes = []


def _share_of_run(nodes: Sequence[tuple[str, float]]) -> float:
    """What follows the embeddings is scoring; they end with a resize or convolution and the sum of both levels."""
    last = max(index for index, (operator, _) in enumerate(nodes) if operator in _NETWORK_ENDS_WITH)
    first_of_scoring = last + (2 if nodes[last + 1][0] == "Add" else 1)
    total = sum(duration for _, duration in nodes)
    return sum(duration for _, duration in nodes[first_of_scoring:]) / total
