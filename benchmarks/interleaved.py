"""Runners timed in turn, round after round in random order, so that what slows the machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meliad_edge.metrics import CONFIDENCE
from meliad_edge.progress import track

RESAMPLES = 10_000
_MOST_FRAMES = 20
# A slow runner gets fewer frames, one at least: its round would otherwise outlast the weather of the machine.
_ROUND_S = 0.3
# ONNX Runtime's threads keep spinning for a while after a run, which would slow the next runner down.
_REST_S = 0.02

Frame = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long one runner takes as another.

    Attributes:
        median: Of the ratios within the rounds.
        low: Lower bound of its interval, 95 %, percentile bootstrap over the rounds.
        high: Upper bound.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Rounds:
    """What was timed.

    Attributes:
        medians_s: By name, the median time of a frame in every round, in seconds.
        failures: By name, why a runner was dropped; it is not in ``medians_s``.
    """

    medians_s: Mapping[str, Sequence[float]]
    failures: Mapping[str, str]

    def median_ms(self, name: str) -> float:
        """Median over the rounds of their medians, in milliseconds."""
        return 1e3 * float(np.median(self.medians_s[name]))

    def ratio(self, name: str, reference: str) -> Ratio:
        """Time of a runner over that of another, each pair taken within one round."""
        ratios = np.divide(self.medians_s[name], self.medians_s[reference])
        drawn = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
        tails = [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0]
        low, high = np.quantile(np.median(ratios[drawn], axis=1), tails)
        return Ratio(float(np.median(ratios)), float(low), float(high))


def time_rounds(
    runners: Mapping[str, Callable[[Frame], object]],
    frames: Sequence[Frame],
    rounds: int,
    rng: np.random.Generator,
    *,
    clock: Callable[[], float] = time.perf_counter,
    rest: Callable[[float], None] = time.sleep,
) -> Rounds:
    """Time every runner in every round; a round before the first warms up and is forgotten.

    In a round a runner takes one frame that is not counted and up to 20 that are: fewer where these would take more
    than 0.3 seconds, at least one.

    Args:
        runners: By name, what takes one frame.
        frames: Frames, given in turn.
        rounds: Rounds that count.
        rng: Of the order within a round.
        clock: Seconds.
        rest: Called with seconds before every runner's turn.

    Returns:
        Times of all runners that never failed; one that raises is dropped with its reason.
    """
    medians_s: dict[str, list[float]] = {name: [] for name in runners}
    failures: dict[str, str] = {}
    for index in track(range(rounds + 1), "rounds"):
        for name in rng.permutation(list(runners)).tolist():
            if name in failures:
                continue
            rest(_REST_S)
            try:
                taken_s = _time_turn(runners[name], frames, clock)
            except Exception as error:  # engines have no common base class for what they raise
                failures[name] = f"{type(error).__name__}: {error}"
                continue
            if index > 0:
                medians_s[name].append(float(np.median(taken_s)))
    return Rounds({name: of_name for name, of_name in medians_s.items() if name not in failures}, failures)


def _time_turn(run: Callable[[Frame], object], frames: Sequence[Frame], clock: Callable[[], float]) -> list[float]:
    first_s = _time_frame(run, frames[0], clock)
    count = int(np.clip(_ROUND_S / max(first_s, 1e-6), 1, _MOST_FRAMES))
    return [_time_frame(run, frames[index % len(frames)], clock) for index in range(count)]


def _time_frame(run: Callable[[Frame], object], frame: Frame, clock: Callable[[], float]) -> float:
    start = clock()
    run(frame)
    return clock() - start
