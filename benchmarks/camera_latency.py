"""From the picture in front of a camera to the decision on it, over a real stream, for more and more cameras."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np

from meliad_edge.benchmarks.clock_cameras import CLOCK_ROWS, clock_cameras
from meliad_edge.benchmarks.picture_clock import age_s
from meliad_edge.bundle import Bundle, require_golden
from meliad_edge.errors import SourceError
from meliad_edge.monitor.latency import LatencySummary, summarise
from meliad_edge.precision import Precision
from meliad_edge.runtime.batching import measure_batch_size
from meliad_edge.runtime.choice import EngineChoice
from meliad_edge.runtime.load import make_predictor
from meliad_edge.runtime.predictor import Predictor
from meliad_edge.runtime.view import Box, View
from meliad_edge.stream.sources import open_source
from meliad_edge.stream.uri import parse_source, with_unique_names
from meliad_edge.stream.watcher import Camera, Decision, FrameCounts, Watcher

WARM_UP_S = 2.0


@dataclass(frozen=True, slots=True)
class CameraLatency:
    """Some cameras on one model.

    Attributes:
        cameras: How many.
        batch_size: Most frames that were scored together.
        offered_fps: Pictures per second of all cameras.
        scored_fps: Decisions per second.
        frames: What became of the frames, the warm-up included.
        missed: Of the decisions measured, those later than the deadline; None without one.
        shares: Decisions of each camera.
        glass_to_decision: From the moment at which the picture was made to its decision; it includes JPEG
            compression, the network of the machine, decoding, the wait for its turn and the engine.
        infer: The engine's part.
    """

    cameras: int
    batch_size: int
    offered_fps: float
    scored_fps: float
    frames: FrameCounts
    missed: int | None
    shares: tuple[int, ...]
    glass_to_decision: LatencySummary
    infer: LatencySummary

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "glass_to_decision": self.glass_to_decision.to_dict(),
            "infer": self.infer.to_dict(),
        }


def measure_cameras(
    bundle: Bundle,
    precision: Precision | None,
    counts: Sequence[int],
    *,
    engine: EngineChoice = "auto",
    threads: int | None = None,
    fps: float = 25.0,
    frame_hw: tuple[int, int] = (480, 640),
    seconds: float = 10.0,
    deadline_s: float | None = None,
) -> list[CameraLatency]:
    """Watch cameras that film a clock, served by a process on this machine, and read the clock at every decision.

    Args:
        bundle: The model; its golden frames are what the cameras see.
        precision: Which of its graphs; None takes the default of the engine.
        counts: Numbers of cameras, one measurement each.
        engine: What executes the model.
        threads: Threads of the engine.
        fps: Pictures per second of each camera.
        frame_hw: Height and width of the pictures; a strip of 32 rows with the clock comes on top.
        seconds: Of each measurement, after a warm-up of two.
        deadline_s: From picture to decision, where misses are to be counted.
    """
    predictor = make_predictor(bundle, precision=precision, engine=engine, threads=threads)
    golden = [frame.frame for frame in require_golden(bundle)]
    picture = np.asarray(cv2.resize(golden[0], frame_hw[::-1]), dtype=np.uint8)
    with clock_cameras(picture, picture, fps=fps, bad_every_s=seconds, bad_for_s=0.0) as url:
        return [
            _measure(
                predictor,
                [url] * count,
                View(Box(0, CLOCK_ROWS, frame_hw[1], frame_hw[0])),
                batch_size=measure_batch_size(predictor.engine, golden, count),
                fps=fps,
                seconds=seconds,
                deadline_s=deadline_s,
            )
            for count in counts
        ]


def _measure(
    predictor: Predictor,
    urls: Sequence[str],
    view: View,
    *,
    batch_size: int,
    fps: float,
    seconds: float,
    deadline_s: float | None,
) -> CameraLatency:
    ages_s: list[float] = []
    infer_s: list[float] = []
    sources = with_unique_names([parse_source(url) for url in urls])
    shares = {source.name: 0 for source in sources}
    start_s = time.monotonic()

    def take(decision: Decision) -> None:
        now_s = time.monotonic()
        age = age_s(decision.frame.image[:CLOCK_ROWS], now_s)
        if age is not None and now_s - start_s >= WARM_UP_S:
            ages_s.append(age)
            infer_s.append(decision.prediction.times.infer_s)
            shares[decision.camera] += 1
        if now_s - start_s >= WARM_UP_S + seconds:
            watcher.stop()

    watcher = Watcher(
        predictor,
        [Camera(open_source(source), view) for source in sources],
        batch_size=batch_size,
        on_event=lambda event: None,
        on_notice=lambda name, notice: None,
        on_failure=_raise,
        on_decision=take,
    )
    watcher.run()
    if not ages_s:
        msg = f"{len(urls)} cameras: no picture was decided on in {seconds:g} s; take fewer, or more --seconds"
        raise SourceError(msg)
    return CameraLatency(
        cameras=len(urls),
        batch_size=batch_size,
        offered_fps=fps * len(urls),
        scored_fps=len(ages_s) / seconds,
        frames=watcher.summary().frames,
        missed=None if deadline_s is None else sum(age > deadline_s for age in ages_s),
        shares=tuple(shares.values()),
        glass_to_decision=summarise(ages_s),
        infer=summarise(infer_s),
    )


def _raise(name: str, error: Exception) -> None:
    raise error
