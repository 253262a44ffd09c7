"""Latency as it is reported everywhere: percentiles, spread and throughput of samples in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CAPACITY = 1 << 15


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """What a set of latency samples says.

    Percentiles are samples that occurred, never interpolated, chosen as NVIDIA's trtexec chooses them:
    of n samples sorted upwards, p leaves out the floor((100 - p) / 100 * n) largest and takes the next. With fewer
    than a thousand samples the 99.9th is the largest.

    Attributes:
        count: Number of samples.
        p50_s, p90_s, p95_s, p99_s, p999_s: Percentiles, seconds; the last is the 99.9th.
        mean_s: Mean, seconds.
        cov: Coefficient of variation: population standard deviation over mean, no unit.
        throughput_per_s: Samples per second of elapsed time.
    """

    count: int
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float
    p999_s: float
    mean_s: float
    cov: float
    throughput_per_s: float

    def to_dict(self) -> dict[str, float]:
        """JSON values, times in milliseconds."""
        return {
            "count": self.count,
            "p50_ms": 1e3 * self.p50_s,
            "p90_ms": 1e3 * self.p90_s,
            "p95_ms": 1e3 * self.p95_s,
            "p99_ms": 1e3 * self.p99_s,
            "p999_ms": 1e3 * self.p999_s,
            "mean_ms": 1e3 * self.mean_s,
            "cov": self.cov,
            "throughput_per_s": self.throughput_per_s,
        }


def summarise(samples_s: Sequence[float] | NDArray[np.floating], *, elapsed_s: float | None = None) -> LatencySummary:
    """Summarise latency samples.

    Args:
        samples_s: Latencies in seconds, [n], at least one.
        elapsed_s: Time in which all of them happened; None when they ran one after the other without pause.
    """
    ordered = np.sort(np.asarray(samples_s, dtype=np.float64))
    count = len(ordered)
    mean_s = float(ordered.mean())
    duration_s = float(ordered.sum()) if elapsed_s is None else elapsed_s
    left_out = (500, 100, 50, 10, 1)  # of a thousand
    p50_s, p90_s, p95_s, p99_s, p999_s = (float(ordered[count - 1 - share * count // 1000]) for share in left_out)
    return LatencySummary(
        count=count,
        p50_s=p50_s,
        p90_s=p90_s,
        p95_s=p95_s,
        p99_s=p99_s,
        p999_s=p999_s,
        mean_s=mean_s,
        cov=float(ordered.std()) / mean_s if mean_s > 0.0 else 0.0,
        throughput_per_s=count / duration_s if duration_s > 0.0 else 0.0,
    )


class LatencyRecorder:
    """Keeps the most recent samples, in memory that does not grow.

    Args:
        capacity: Most samples kept.
    """

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._samples_s = np.empty(capacity, dtype=np.float64)
        self._recorded = 0

    def record(self, sample_s: float) -> None:
        """Add one sample, in seconds; the oldest makes room."""
        self._samples_s[self._recorded % len(self._samples_s)] = sample_s
        self._recorded += 1

    def summarise(self) -> LatencySummary | None:
        """Summary of the samples kept; None when there are none."""
        return summarise(self._samples_s[: self._recorded]) if self._recorded else None
