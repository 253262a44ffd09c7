"""``watch`` under load: cameras on one model, how fresh what it judges is, and what it costs beyond the engine."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.benchmarks.clock_cameras import CLOCK_ROWS, clock_cameras
from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.benchmarks.page_client import open_page
from meliad_edge.benchmarks.picture_clock import age_s
from meliad_edge.calibrate import move_threshold
from meliad_edge.child_process import end_with_parent
from meliad_edge.event_store import EventStore
from meliad_edge.events import Event, EventKind, EventState
from meliad_edge.monitor.latency import summarise
from meliad_edge.precision import Precision
from meliad_edge.runtime.load import load_predictor
from meliad_edge.stream.watcher import Decision
from meliad_edge.watch import Watch, open_cameras
from meliad_edge.watch_config import CameraConfig, PageAddress

_SIZE = 256
_PICTURE_HW = (480, 640)
_FPS = 25.0
_BAD_EVERY_S, _BAD_FOR_S = 10.0, 1.0
_MEMORY_EVERY_S = 5.0
_PAGE_S, _PAGE_ROUNDS = 8.0, 6
_MOST_FPS = 500.0
# Caches fill and the allocator settles: the slope counts from here.
_SETTLING_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class _Task:
    """What one watch does."""

    bundle: Path
    precision: Precision
    threshold: float
    url: str
    cameras: int
    max_fps: float | None
    seconds: float
    folder: Path
    keeps_times: bool = False


def run(minutes: float, precision: Precision) -> dict[str, Any]:
    """Watch one camera at its leisure, then four that offer more than the machine can take.

    Args:
        minutes: Of the four cameras; the one takes a tenth of it, and one minute at most.
        precision: Graph of the sample bundle.

    Returns:
        JSON values: ``single``, one camera of which five pictures a second are judged, with ``beyond_engine``, the time
        from capture to decision beyond conversion and engine, over that of these two; ``overload``, four cameras of 25,
        with ``shares`` of each, ``unfairness``, the largest distance of a share from the mean over the mean, ages in
        milliseconds since the picture was made, those of events since the capture of the first bad picture that was
        judged, and ``memory_slope_mb_per_h``; ``page``, the share of its throughput that four cameras lose while one
        page is open, opened and closed in turn.
    """
    from meliad_edge.benchmarks.sample_model import sample_bundle, sample_model

    model = sample_model(_SIZE)
    with tempfile.TemporaryDirectory(prefix="meliad-watch-") as name:
        precisions: tuple[Precision, ...] = ("fp32",) if precision == "fp32" else ("fp32", precision)
        bundle = sample_bundle(model, Path(name) / "sample.meliad", precisions)
        result = measure(bundle.path, precision, list(model.frames), minutes)
    return {"benchmark": "watch", "precision": precision, "minutes": minutes, **result}


def measure(bundle: Path, precision: Precision, frames: Sequence[NDArray[np.uint8]], minutes: float) -> dict[str, Any]:
    """The same of any bundle.

    Args:
        bundle: The model.
        precision: Which of its graphs.
        frames: uint8 RGB [H, W, 3]; the cameras show the one with the lowest score, and as the bad part the highest.
        minutes: Of the four cameras; the one takes a tenth of it, and one minute at most.
    """
    pictures = [np.asarray(cv2.resize(frame, _PICTURE_HW[::-1]), dtype=np.uint8) for frame in frames]
    predictor = load_predictor(bundle, precision=precision)
    scores = [predictor.predict(picture).score for picture in pictures]
    good, bad = pictures[int(np.argmin(scores))], pictures[int(np.argmax(scores))]
    del predictor
    with (
        tempfile.TemporaryDirectory(prefix="meliad-watch-") as name,
        clock_cameras(good, bad, fps=_FPS, bad_every_s=_BAD_EVERY_S, bad_for_s=_BAD_FOR_S) as url,
    ):
        threshold = 0.5 * (min(scores) + max(scores))
        task = _Task(bundle, precision, threshold, url, 1, 5.0, min(60.0, 6.0 * minutes), Path(name) / "single")
        single = _in_a_process(task)
        overload = _in_a_process(
            replace(task, cameras=4, max_fps=None, seconds=60.0 * minutes, folder=Path(name) / "overload")
        )
        page = _measure_page(
            replace(
                task,
                cameras=4,
                max_fps=None,
                seconds=2 * _PAGE_ROUNDS * _PAGE_S,
                folder=Path(name) / "page",
                keeps_times=True,
            )
        )
    return {
        "camera": f"MJPEG {_PICTURE_HW[1]}x{_PICTURE_HW[0]} at {_FPS:g} fps, over HTTP on the same machine",
        "single": single,
        "overload": overload,
        "page": page,
        "environment": describe_environment(),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as lines for people."""
    single, overload = result["single"], result["overload"]
    age, event, page = overload["age_ms"], overload["event_ms"], result["page"]
    return [
        (
            "one camera",
            f"capture to decision {single['capture_to_decision_ms']:.2f} ms, engine {single['infer_ms']:.2f} ms; "
            f"{100 * single['beyond_engine']:.1f} % beyond conversion and engine",
        ),
        (
            "four",
            f"{overload['fps']:.1f} frames/s in batches of up to {overload['batch_size']}, "
            f"shares {', '.join(str(share) for share in overload['shares'])} "
            f"({100 * overload['unfairness']:.1f} % from even)",
        ),
        ("age", f"p50 {age['p50_ms']:.0f}, p99 {age['p99_ms']:.0f} ms from the picture to its decision"),
        (
            "events",
            f"{event['count']}, p50 {event['p50_ms']:.0f}, p99 {event['p99_ms']:.0f} ms from the first bad picture",
        ),
        (
            "memory",
            f"{overload['memory_mb']:.0f} MB at the end, {overload['memory_slope_mb_per_h']:+.2f} MB per hour over "
            f"{overload['seconds'] / 60:.0f} minutes",
        ),
        (
            "page",
            f"{page['open_fps']:.1f} frames/s with one open page, {page['closed_fps']:.1f} without: "
            f"{100 * page['cost']:.1f} % less (median of {len(page['costs'])} pairs)",
        ),
    ]


def _in_a_process(task: _Task, meanwhile: Callable[[str], None] = lambda url: None) -> dict[str, Any]:
    """Memory is that of ``watch`` alone; the page is served, and somebody may look at it meanwhile."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_watch, args=(theirs, task), daemon=True)
    process.start()
    theirs.close()
    meanwhile(ours.recv())
    result: dict[str, Any] = ours.recv()
    process.join()
    return result


def _measure_page(task: _Task) -> dict[str, Any]:
    """The page is opened and closed in turn, in one watch."""
    spans: list[tuple[float, float, bool]] = []

    def look(url: str) -> None:
        time.sleep(_PAGE_S / 2)
        for _ in range(_PAGE_ROUNDS):
            for is_open in (False, True):
                with open_page(url, task.cameras) if is_open else nullcontext():
                    start_s = time.monotonic()
                    time.sleep(_PAGE_S)
                    spans.append((start_s, time.monotonic(), is_open))

    decided_s = np.asarray(_in_a_process(replace(task, seconds=task.seconds + 3 * _PAGE_S), look)["decided_s"])
    rates = [np.count_nonzero((decided_s >= begin) & (decided_s < end)) / (end - begin) for begin, end, _ in spans]
    closed, opened = rates[::2], rates[1::2]
    costs = [1.0 - there / without for without, there in zip(closed, opened, strict=True)]
    return {
        "open_fps": float(np.median(opened)),
        "closed_fps": float(np.median(closed)),
        "cost": float(np.median(costs)),
        "costs": costs,
    }


class _Samples:
    """Numbers in memory that is taken, and written to, at once: the slope of the memory is that of the watch."""

    def __init__(self, capacity: int) -> None:
        self._values = np.full(capacity, np.nan)
        self._count = 0

    def append(self, value: float) -> None:
        """Keep one number, unless it is full."""
        if self._count < len(self._values):
            self._values[self._count] = value
            self._count += 1

    @property
    def values(self) -> list[float]:
        """Those kept, in order."""
        kept: list[float] = self._values[: self._count].tolist()
        return kept


@dataclass(slots=True)
class _Seen:
    """What was measured while it watched."""

    ages_s: _Samples
    decided_s: _Samples
    event_s: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    damaged: int = 0


def _watch(connection: Connection, task: _Task) -> None:
    end_with_parent()
    predictor = load_predictor(task.bundle, precision=task.precision)
    calibration = move_threshold(predictor.bundle.calibration, task.threshold)
    predictor.bundle = replace(predictor.bundle, calibration=calibration)
    height, width = _PICTURE_HW
    configs = [
        CameraConfig(source=task.url, name=f"cam{i}", max_fps=task.max_fps, region=(0, CLOCK_ROWS, width, height))
        for i in range(task.cameras)
    ]
    capacity = round(_MOST_FPS * task.seconds)
    seen = _Seen(_Samples(capacity), _Samples(capacity))
    start_s = time.monotonic()

    def take_decision(decision: Decision) -> None:
        now_s = time.monotonic()
        seen.decided_s.append(now_s)
        age = age_s(decision.frame.image[:CLOCK_ROWS], now_s)
        if age is None:
            seen.damaged += 1
        else:
            seen.ages_s.append(age)
        if now_s - start_s >= len(seen.memory) * _MEMORY_EVERY_S:
            seen.memory.append((now_s - start_s, _resident_mb()))
        if now_s - start_s >= task.seconds:
            watch.watcher.stop()

    with Watch(
        predictor,
        open_cameras(predictor, configs, {}, _raise, calibration=calibration),
        store=EventStore(task.folder),
        sinks=[_EventTimes(seen)],
        on_notice=lambda name, notice: None,
        on_failure=_raise,
        on_decision=take_decision,
    ) as watch:
        connection.send(watch.serve(PageAddress("127.0.0.1", 0)))
        watch.run()
    connection.send(_summarise(watch, seen, time.monotonic() - start_s, keeps_times=task.keeps_times))


class _EventTimes:
    """Takes the time from the first bad picture to the sink, for every event."""

    name = "times"

    def __init__(self, seen: _Seen) -> None:
        self._seen = seen

    def publish(self, event: Event) -> None:
        """Record a new anomaly."""
        if event.state is EventState.NEW and event.kind is EventKind.ANOMALY:
            self._seen.event_s.append(time.monotonic() - event.started.monotonic_s)

    def close(self) -> None:
        """Nothing to do."""


def _summarise(watch: Watch, seen: _Seen, elapsed_s: float, *, keeps_times: bool) -> dict[str, Any]:
    summary = watch.summary()
    shares = [source.frames.scored for source in summary.sources]
    mean = sum(shares) / len(shares)
    median_ms = {stage: 1e3 * latency.p50_s for stage, latency in summary.latencies.items()}
    engine_ms = median_ms["decode"] + median_ms["infer"]
    settled = [point for point in seen.memory if point[0] >= _SETTLING_SHARE * elapsed_s]
    slope = np.polyfit([s for s, _ in settled], [mb for _, mb in settled], 1)[0] if len(settled) > 2 else 0.0
    return {
        "seconds": elapsed_s,
        "fps": summary.throughput_fps,
        "batch_size": watch.batch_size,
        "shares": shares,
        "unfairness": max(abs(share - mean) for share in shares) / mean,
        "frames": {name: getattr(summary.frames, name) for name in ("read", "dropped", "stale", "bad")},
        "damaged": seen.damaged,
        "decided_s": seen.decided_s.values if keeps_times else [],
        "capture_to_decision_ms": median_ms["capture_to_decision"],
        "infer_ms": median_ms["infer"],
        "conversion_ms": median_ms["decode"],
        "preprocess_ms": median_ms["preprocess"],
        "beyond_engine": (median_ms["capture_to_decision"] - engine_ms) / engine_ms,
        "age_ms": summarise(seen.ages_s.values).to_dict(),
        "event_ms": summarise(seen.event_s or [0.0]).to_dict(),
        "memory_mb": seen.memory[-1][1],
        "memory_slope_mb_per_h": 3600.0 * float(slope),
        "memory": [[round(s, 1), round(mb, 2)] for s, mb in seen.memory],
    }


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _raise(name: str, error: Exception) -> None:
    raise error
