"""How many waiting frames are scored in one call: as many as make a frame cheaper on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meliad_edge.runtime.engine import Engine

# A frame must become cheaper by this share, or the wait for its neighbours is not worth it.
_SMALLEST_GAIN = 0.1
_RUNS = 7


def measure_batch_size(engine: Engine, frames: Sequence[NDArray[np.uint8]], most: int) -> int:
    """Try batches of 1, 2, 4, ... and return the largest that still makes a frame cheaper; takes part of a second.

    Args:
        engine: What scores.
        frames: RGB uint8 [H, W, 3] at the engine's input size, such as golden frames; random ones where there are none.
        most: Largest batch that can occur.
    """
    height, width = engine.input_size_hw
    shown = list(frames) or [np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)]
    best, best_s = 1, _frame_time_s(engine, shown, 1)
    while 2 * best <= most:
        frame_s = _frame_time_s(engine, shown, 2 * best)
        if frame_s > (1.0 - _SMALLEST_GAIN) * best_s:
            break
        best, best_s = 2 * best, frame_s
    return best


def _frame_time_s(engine: Engine, frames: Sequence[NDArray[np.uint8]], size: int) -> float:
    batch = np.stack([frames[index % len(frames)] for index in range(size)])
    engine.infer(batch)  # The first call of a size allocates.
    times_s = []
    for _ in range(_RUNS):
        start_s = time.perf_counter()
        engine.infer(batch)
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s) / size
