from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meliad_edge.benchmarks.picture_clock import age_s, draw_clock, read_clock


def test_what_is_drawn_is_read() -> None:
    generator = np.random.default_rng(0)
    for value in [0, 1, 2**32 - 1, *generator.integers(0, 2**32, 20).tolist()]:
        strip = generator.integers(0, 256, (32, 640, 3), dtype=np.uint8)
        draw_clock(strip, value)
        noisy = np.clip(strip + generator.normal(0, 25, strip.shape), 0, 255).astype(np.uint8)
        assert read_clock(noisy) == value


def test_a_damaged_clock_is_not_read() -> None:
    strip = np.zeros((32, 640, 3), np.uint8)
    draw_clock(strip, 123_456)
    strip[:8, 40:80] = 255 - strip[:8, 40:80]
    assert read_clock(strip) is None
    assert read_clock(np.zeros((32, 640, 3), np.uint8)) is None


@pytest.mark.parametrize("now_s", [100.0, 2**32 / 1000 + 100.0, 2**32 / 1000 + 0.01])
def test_the_age_survives_the_wrap_of_the_counter(now_s: float) -> None:
    strip = np.zeros((32, 640, 3), np.uint8)
    draw_clock(strip, round(1000 * (now_s - 0.25)) % 2**32)
    assert age_s(strip, now_s) == pytest.approx(0.25, abs=0.002)


def test_cameras_are_measured_from_the_picture_to_the_decision(bundle_file: Path, invoke: Any) -> None:
    outcome = invoke(
        "bench",
        "cameras",
        bundle_file,
        "--cameras",
        "1,2",
        "--fps",
        10,
        "--seconds",
        2,
        "--deadline-ms",
        0.001,
        "--json",
    )
    assert outcome.code == 0, outcome.err
    one, two = outcome.json["measurements"]
    assert (one["cameras"], two["cameras"], two["offered_fps"]) == (1, 2, 20.0)
    for measured in (one, two):
        glass = measured["glass_to_decision"]
        assert glass["count"] == sum(measured["shares"]) == measured["missed"] > 0
        assert glass["p50_ms"] >= measured["infer"]["p50_ms"]
        assert measured["frames"]["bad"] == 0
    assert len(two["shares"]) == 2 and min(two["shares"]) > 0


def test_a_table_for_people(bundle_file: Path, invoke: Any) -> None:
    outcome = invoke("bench", "cameras", bundle_file, "--cameras", "1", "--seconds", 1)
    assert outcome.code == 0, outcome.err
    assert "from the picture to its decision" in " ".join(outcome.out.split())
    assert invoke("bench", "cameras", bundle_file, "--cameras", "0").code == 2


def test_the_load_benchmark_reports_what_it_promises(bundle_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="the page needs the extra monitor")
    from meliad_edge.benchmarks import watching
    from meliad_edge.bundle import open_bundle

    monkeypatch.setattr(watching, "_PAGE_S", 1.0)
    monkeypatch.setattr(watching, "_PAGE_ROUNDS", 2)
    frames = [golden.frame for golden in open_bundle(bundle_file).golden]
    result = watching.measure(bundle_file, "fp32", frames, 0.2)
    overload = result["overload"]
    assert len(overload["shares"]) == 4 and min(overload["shares"]) > 0
    assert overload["damaged"] == 0
    assert len(result["page"]["costs"]) == 2 and result["page"]["open_fps"] > 0
    assert overload["event_ms"]["count"] >= 4
    assert {topic for topic, _ in watching.describe(result)} == {
        "one camera",
        "four",
        "age",
        "events",
        "memory",
        "page",
    }
