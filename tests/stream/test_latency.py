from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meliad_edge.monitor.latency import LatencyRecorder, summarise


def test_percentiles_are_those_of_trtexec() -> None:
    # trtexec: sorted[max(n - 1 - int((1 - p / 100) * n), 0)]
    samples_s = [i / 1000 for i in range(1, 101)]
    random.Random(0).shuffle(samples_s)
    summary = summarise(samples_s)
    assert (summary.p50_s, summary.p90_s, summary.p95_s, summary.p99_s) == (0.050, 0.090, 0.095, 0.099)
    assert summary.mean_s == pytest.approx(0.0505)
    assert summary.cov == pytest.approx(np.std(samples_s) / 0.0505)
    assert summary.throughput_per_s == pytest.approx(100 / 5.05)


def test_a_single_sample_is_every_percentile() -> None:
    summary = summarise([0.02], elapsed_s=0.1)
    assert (summary.p50_s, summary.p99_s, summary.cov, summary.throughput_per_s) == (0.02, 0.02, 0.0, 10.0)


def test_no_samples_no_summary() -> None:
    assert LatencyRecorder().summarise() is None


@given(st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=300))
def test_percentiles_are_ordered_samples(samples_s: list[float]) -> None:
    summary = summarise(samples_s)
    percentiles_s = [summary.p50_s, summary.p90_s, summary.p95_s, summary.p99_s]
    assert percentiles_s == sorted(percentiles_s)
    assert set(percentiles_s) <= set(samples_s)


@given(count=st.integers(1, 100), capacity=st.integers(1, 20))
def test_a_recorder_keeps_the_most_recent(count: int, capacity: int) -> None:
    recorder = LatencyRecorder(capacity)
    for i in range(count):
        recorder.record(i + 1.0)
    kept = [i + 1.0 for i in range(count)][-capacity:]
    assert recorder.summarise() == summarise(kept)
