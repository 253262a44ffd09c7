"""How often drift of scores is reported without cause, and how soon with one; scores are drawn, not of a model."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.calibrate import calibrate
from meliad_edge.monitor.drift import DriftLimits, DriftMonitor
from meliad_edge.progress import track
from meliad_edge.runtime.predictor import Prediction, StageTimes
from meliad_edge.stream.frames import Frame

_CALIBRATIONS = (30, 50, 200, 500)
_GOOD_SAMPLES = 5000
# Samples before the shift, and at most after it.
_BEFORE, _AFTER = (0, 300), 300
_SHIFT = 1.0
_LEVELS = 211  # Pictures that differ, as far as a glance tells.

_Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
# Of standard deviation 1; the second has the long tail that scores of real parts have.
_DISTRIBUTIONS: dict[str, _Draw] = {
    "normal": lambda rng, count: rng.normal(size=count),
    "gamma": lambda rng, count: rng.gamma(2.0, size=count) / np.sqrt(2.0),
}


def run(lines: int = 100) -> dict[str, Any]:
    """Give scores to monitors.

    Args:
        lines: Of each kind, each with a calibration of its own.

    Returns:
        JSON values; by distribution and size of the calibration: lines with an alarm without cause in 5,000 samples,
        and of a shift by one standard deviation, up or down, lines that found it within 300 samples and after how many.
    """
    kinds = [(name, size) for name in _DISTRIBUTIONS for size in _CALIBRATIONS]
    rows = []
    for name, size in track(kinds, "drift"):
        draw = _DISTRIBUTIONS[name]
        row: dict[str, Any] = {"distribution": name, "calibration": size, "lines": lines}
        row["false_alarms"] = sum(
            _first_alarm(seed, draw, size, 0.0, _GOOD_SAMPLES, 0) is not None for seed in range(lines)
        )
        for word, shift in (("higher", _SHIFT), ("lower", -_SHIFT)):
            for before in _BEFORE:
                found = [_first_alarm(seed, draw, size, shift, before + _AFTER, before) for seed in range(lines)]
                delays = [alarm - before for alarm in found if alarm is not None and alarm >= before]
                row[f"{word}_after_{before}"] = {
                    "found": len(delays),
                    "mean_samples": statistics.mean(delays) if delays else None,
                }
        rows.append(row)
    return {
        "benchmark": "drift",
        "alarm_at": DriftLimits().alarm_at,
        "rows": rows,
        "environment": describe_environment(),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as lines for people."""
    lines = []
    for row in result["rows"]:
        found = ", ".join(
            f"{word} {before} samples: {figures['found']} in {figures['mean_samples'] or 0:.0f}"
            for word in ("higher after", "lower after")
            for before in _BEFORE
            for figures in [row[f"{word.replace(' ', '_')}_{before}"]]
        )
        lines.append(
            (
                row["distribution"],
                f"{row['calibration']:3} calibration scores, {row['lines']} lines: "
                f"{row['false_alarms']} false alarms; {found}",
            )
        )
    return lines


def _first_alarm(seed: int, draw: _Draw, size: int, shift: float, samples: int, before: int) -> int | None:
    """Index of the sample at which drift is reported first, or None."""
    rng = np.random.default_rng(seed)
    calibration = draw(rng, size).tolist()
    scores = draw(rng, samples)
    scores[before:] += shift
    monitor = DriftMonitor(calibration, rng=random.Random(seed))
    threshold = calibrate(calibration).threshold
    for number, frame in enumerate(_frames(samples)):
        prediction = Prediction(float(scores[number]), threshold, _NO_MAP, (), _NO_TIMES)
        if monitor.update(frame, prediction)[0]:
            return number
    return None


def _frames(count: int) -> Iterable[Frame]:
    step_s = DriftLimits().sample_every_s
    return (Frame("line", number, step_s * number, _PICTURES[number % _LEVELS], 0.0, 0.0) for number in range(count))


_PICTURES = [np.full((64, 64, 3), 20 + 61 * number % _LEVELS, np.uint8) for number in range(_LEVELS)]
_NO_MAP = np.zeros((1, 1), np.float32)
_NO_TIMES = StageTimes(0.0, 0.0, 0.0)
