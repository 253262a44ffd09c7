"""Latency of one bundle on this machine, stage by stage, as ``meliad-edge bench`` reports it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from meliad_edge.bundle import Bundle, require_golden
from meliad_edge.data.images import decode_image
from meliad_edge.data.preprocess import to_model_input
from meliad_edge.device.telemetry import Telemetry, energy_between_j, read_telemetry
from meliad_edge.monitor.latency import LatencySummary, summarise
from meliad_edge.precision import Precision
from meliad_edge.progress import progress_bar, track
from meliad_edge.runtime.choice import EngineChoice
from meliad_edge.runtime.load import make_predictor
from meliad_edge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from meliad_edge.runtime.predictor import Predictor
from meliad_edge.runtime.tensorrt_engine import DEVICE_PARTS, TensorRtEngine

STAGES = ("capture", "decode", "preprocess", "infer", *DEVICE_PARTS, "score", "post", "total")
SCHEMA_VERSION = 1
WARM_UP_S = 0.2
WARM_UP_FRAMES = 10
# trtexec warns above this coefficient of variation: the figures may not be trusted.
UNSTABLE_COV = 0.025
# As perf_analyzer: measured until the medians of three windows in a row lie this close together.
WINDOWS = 3
SETTLED_WITHIN = 0.05
_MOST_WINDOWS = 10
_SLOWED_DOWN = 0.9
_BLOCKS = 20
_PROFILED_RUNS = 50
_JPEG_QUALITY = 95


@dataclass(frozen=True, slots=True)
class BatchLatency:
    """The engine alone with several frames at once.

    Attributes:
        batch: Frames.
        p50_s: Median time of the batch, seconds.
        p99_s: 99th percentile of it.
        frames_per_s: Frames in all of the measured time.
    """

    batch: int
    p50_s: float
    p99_s: float
    frames_per_s: float


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
            ``infer`` then includes it. Of TensorRT's ``infer``, by the clock of the device and in runs of their own:
            ``host_to_device``, ``compute`` and ``device_to_host``, which trtexec adds up to its latency.
        block_p50_s: Medians of twenty blocks of consecutive frames, by stage: what ``bench compare`` judges
            differences by.
        total_s: Every frame of the report from the file to the decision.
        windows: Windows that were measured; the report holds the last three.
        settled: Whether the medians of those three lie within 5 % of one another.
        cold_start_s: From the bundle's bytes to a session that can run.
        first_frame_s: Latency of the first frame, before any warm-up.
        deadline_s: Time a frame may take from the file to the decision, where one was given.
        deadline_misses: Frames that took longer.
        batches: The engine with several frames at once, where asked for.
        before, after: What the machine said of itself.
        energy_per_frame_j: Where the board tells; the whole module or processor, not the model alone.
    """

    engine: str
    precision: Precision
    threads: int | None
    frame_hw: tuple[int, int]
    stages: dict[str, LatencySummary]
    block_p50_s: dict[str, list[float]]
    total_s: list[float]
    windows: int
    settled: bool
    cold_start_s: float
    first_frame_s: float
    deadline_s: float | None
    deadline_misses: int | None
    batches: tuple[BatchLatency, ...]
    before: Telemetry
    after: Telemetry
    energy_per_frame_j: float | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the figures cannot be trusted; empty when nothing speaks against them."""
        found = []
        if (spread := self.stages["infer"].cov) > UNSTABLE_COV:
            found.append(f"spread of infer {spread:.1%} is above {UNSTABLE_COV:.1%}; stop what else runs here")
        if not self.settled:
            found.append(
                f"medians of the last {WINDOWS} of {self.windows} windows lie more than {SETTLED_WITHIN:.0%} apart"
            )
        if self.before.cpu_mhz and self.after.cpu_mhz and self.after.cpu_mhz < _SLOWED_DOWN * self.before.cpu_mhz:
            found.append(
                f"the clock fell from {self.before.cpu_mhz:.0f} to {self.after.cpu_mhz:.0f} MHz; fix it or let it cool"
            )
        if (self.after.throttle_count or 0) > (self.before.throttle_count or 0):
            found.append("the processor slowed itself down because of heat or power")
        return tuple(found)

    @property
    def is_stable(self) -> bool:
        """Whether the figures may be quoted."""
        return not self.warnings

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        fields = asdict(self)
        return {"schema_version": SCHEMA_VERSION, **fields, "warnings": self.warnings, "is_stable": self.is_stable}


def measure_latency(
    bundle: Bundle,
    precision: Precision | None,
    *,
    engine: EngineChoice = "onnxruntime",
    frame_hw: tuple[int, int] = (480, 640),
    frames: int = 200,
    threads: int | None = None,
    deadline_s: float | None = None,
    batches: Sequence[int] = (),
) -> LatencyReport:
    """Time every stage from a JPEG file to the decision.

    The golden frames of the bundle, enlarged to ``frame_hw``, are the input: real content, no invented noise. Frames
    are measured in windows until three in a row agree, ten at most; the report is of the last three.

    Args:
        bundle: The model.
        precision: Which of its graphs; None takes the default of the engine.
        engine: What executes it.
        frame_hw: Height and width of the frames.
        frames: Frames in the report, in three windows.
        threads: Threads of the engine.
        deadline_s: Time a frame may take from the file to the decision.
        batches: Sizes of batches to measure the engine with, too.
    """
    start = time.perf_counter()
    predictor = make_predictor(bundle, precision=precision, engine=engine, threads=threads)
    cold_start_s = time.perf_counter() - start
    size = -(-frames // WINDOWS)
    windows: list[dict[str, list[float]]] = []
    with tempfile.TemporaryDirectory(prefix="meliad-bench-") as folder:
        files = _write_frames(bundle, frame_hw, Path(folder))
        first_frame_s = _time_frame(predictor, files[0])["total"]
        _warm_up(predictor, files)
        readings = [read_telemetry()]
        with progress_bar() as bar:
            task = bar.add_task(f"{predictor.engine.name:<24}", total=WINDOWS * size, note="")
            while len(windows) < _MOST_WINDOWS and not _settled(windows):
                if len(windows) >= WINDOWS:
                    bar.update(task, total=(len(windows) + 1) * size, note="not settled yet")
                windows.append(_measure_window(predictor, files, size, lambda: bar.advance(task)))
                readings.append(read_telemetry())
        batch_latencies = tuple(_measure_batch(predictor, bundle, batch, size) for batch in batches)
        last = windows[-WINDOWS:]
        if isinstance(predictor.engine, OnnxRuntimeEngine):
            share = _score_share(bundle, predictor.precision, threads, Path(folder))
            last = [_split_scoring(window, share) for window in last]
        elif isinstance(predictor.engine, TensorRtEngine):
            last[0] |= predictor.engine.time_on_device(require_golden(bundle)[0].frame[np.newaxis], WINDOWS * size)
    samples = {
        stage: [value for window in last for value in window.get(stage, ())] for stage in STAGES if stage in last[0]
    }
    energy_j = energy_between_j(readings)
    return LatencyReport(
        engine=predictor.engine.name,
        precision=predictor.precision,
        threads=threads,
        frame_hw=frame_hw,
        stages={stage: summarise(values) for stage, values in samples.items()},
        block_p50_s={stage: _block_medians(values) for stage, values in samples.items()},
        total_s=samples["total"],
        windows=len(windows),
        settled=_settled(windows),
        cold_start_s=cold_start_s,
        first_frame_s=first_frame_s,
        deadline_s=deadline_s,
        deadline_misses=None if deadline_s is None else sum(value > deadline_s for value in samples["total"]),
        batches=batch_latencies,
        before=readings[0],
        after=readings[-1],
        energy_per_frame_j=None if energy_j is None else energy_j / (len(windows) * size),
    )


def _measure_window(
    predictor: Predictor, files: Sequence[Path], size: int, advance: Callable[[], None]
) -> dict[str, list[float]]:
    window: dict[str, list[float]] = {}
    for index in range(size):
        for stage, seconds in _time_frame(predictor, files[index % len(files)]).items():
            window.setdefault(stage, []).append(seconds)
        advance()
    return window


def _settled(windows: Sequence[dict[str, list[float]]]) -> bool:
    """Whether the last windows agree, as perf_analyzer asks of its own."""
    if len(windows) < WINDOWS:
        return False
    medians = [summarise(window["total"]).p50_s for window in windows[-WINDOWS:]]
    return max(medians) <= (1.0 + SETTLED_WITHIN) * min(medians)


def _block_medians(samples_s: Sequence[float]) -> list[float]:
    return [summarise(block).p50_s for block in np.array_split(samples_s, min(_BLOCKS, len(samples_s)))]


def _split_scoring(window: dict[str, list[float]], share: float) -> dict[str, list[float]]:
    """The engine's time as the network's and the scoring's."""
    infer = np.asarray(window["infer"])
    return {**window, "infer": list(infer * (1.0 - share)), "score": list(infer * share)}


def _measure_batch(predictor: Predictor, bundle: Bundle, batch: int, runs: int) -> BatchLatency:
    """Model-sized frames through the engine, ``batch`` at a time."""
    golden = require_golden(bundle)
    frames = np.stack([golden[index % len(golden)].frame for index in range(batch)])
    for _ in range(WINDOWS):
        predictor.engine.infer(frames)
    samples_s = []
    for _ in track(range(max(WINDOWS, runs // batch)), f"batches of {batch}"):
        start = time.perf_counter()
        predictor.engine.infer(frames)
        samples_s.append(time.perf_counter() - start)
    summary = summarise(samples_s)
    return BatchLatency(batch, summary.p50_s, summary.p99_s, batch * summary.throughput_per_s)


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
    """Of the scoring node, or where there is none, of what follows the last convolution."""
    total = sum(duration for _, duration in nodes)
    scoring = [duration for operator, duration in nodes if operator == "PatchEntropyScore"]
    if not scoring:
        convolutions = [index for index, (operator, _) in enumerate(nodes) if operator.endswith("Conv")]
        scoring = [duration for _, duration in nodes[convolutions[-1] + 1 :]] if convolutions else []
    return sum(scoring) / total
