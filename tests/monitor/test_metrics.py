from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families

import meliad_edge
from meliad_edge.events import EventKind
from meliad_edge.monitor.metrics import CONDITIONS, SinkStatus
from meliad_edge.stream.reader import ReaderState

DASHBOARD = Path(meliad_edge.__file__).parent / "monitor" / "grafana.json"


def families(watch: Any) -> dict[str, Metric]:
    content, _ = watch.metrics.render()
    return {family.name: family for family in text_string_to_metric_families(content.decode())}


def value(watch: Any, name: str, /, **labels: str) -> float:
    for family in families(watch).values():
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    raise AssertionError((name, labels))


def test_a_decision_is_measured_in_seconds(watch: Any, pictures: Any) -> None:
    for latency_s in (0.004, 0.012, 0.4):
        watch.decide("belt", pictures(40), latency_s=latency_s)
    assert value(watch, "meliad_capture_to_decision_seconds_count", camera="belt") == 3
    assert value(watch, "meliad_capture_to_decision_seconds_sum", camera="belt") == pytest.approx(0.416)
    assert value(watch, "meliad_capture_to_decision_seconds_bucket", camera="belt", le="0.015") == 2
    assert value(watch, "meliad_frame_to_decision_seconds_bucket", camera="belt", le="0.002") == 1
    assert value(watch, "meliad_engine_seconds_count") == 3


def test_what_stands_is_read_when_somebody_asks(watch: Any, pictures: Any) -> None:
    belt, other, hostile = watch.names
    watch.decide(belt, pictures(40))
    watch.decide(other, pictures(50))
    event = watch.begin_anomaly(belt)
    watch.begin_condition(other, EventKind.CAMERA, "frozen", "the same picture for 12 s")
    watch.begin_condition(other, EventKind.DRIFT, "higher", "1.8 spreads")
    watch.readers[hostile].state = ReaderState.WAITING
    watch.readers[hostile].reconnects = 3
    watch.sinks.append(SinkStatus("https://hooks.example/line", 5, 2))
    watch.threshold.move(value=77.0)
    assert value(watch, "meliad_camera_up", camera=belt) == 1
    assert value(watch, "meliad_camera_up", camera=hostile) == 0
    assert value(watch, "meliad_camera_reconnects_total", camera=hostile) == 3
    assert value(watch, "meliad_anomaly_open", camera=belt) == 1
    assert value(watch, "meliad_anomaly_events_total", camera=belt) == 1
    assert value(watch, "meliad_anomaly_events_total", camera=other) == 0
    assert value(watch, "meliad_score", camera=belt) == watch.board.latest(belt).prediction.score
    assert value(watch, "meliad_threshold") == 77.0
    assert value(watch, "meliad_score_drift", camera=other) == 1
    assert value(watch, "meliad_sink_pending", sink="https://hooks.example/line") == 5
    assert value(watch, "meliad_sink_lost_total", sink="https://hooks.example/line") == 2
    states = {name: value(watch, "meliad_camera_condition", camera=other, condition=name) for name in CONDITIONS}
    assert states == {name: float(name == "frozen") for name in CONDITIONS}
    watch.end(event)
    assert value(watch, "meliad_anomaly_open", camera=belt) == 0
    assert value(watch, "meliad_anomaly_events_total", camera=belt) == 1


def test_the_model_and_the_version_are_named(watch: Any) -> None:
    labels = {
        "name": "line3",
        "version": "7",
        "sha256": watch.predictor.model_sha256,
        "engine": "brightness",
        "precision": "fp32",
    }
    assert value(watch, "meliad_model_info", **labels) == 1
    assert value(watch, "meliad_build_info", version=meliad_edge.__version__) == 1
    assert value(watch, "process_resident_memory_bytes") > 1e6


def test_a_score_that_is_not_a_number_is_told_as_such(watch: Any, pictures: Any) -> None:
    watch.predictor.engine.is_broken = True
    watch.decide("belt", pictures(40))
    assert math.isnan(value(watch, "meliad_score", camera="belt"))


def test_both_text_formats_can_be_read(watch: Any, pictures: Any) -> None:
    watch.decide(watch.names[2], pictures(40))
    plain, plain_type = watch.metrics.render()
    assert plain_type.startswith("text/plain; version=0.0.4")
    open_metrics, open_type = watch.metrics.render("application/openmetrics-text; version=1.0.0")
    assert open_type.startswith("application/openmetrics-text")
    names = {family.name for family in text_string_to_metric_families(plain.decode())}
    assert {family.name for family in parse_open_metrics(open_metrics.decode())} >= {
        name for name in names if name.startswith("meliad_score")
    }


def test_frames_are_counted_as_the_watch_counts_them(watch: Any, run_watch: Any) -> None:
    watcher = run_watch(watch)
    (summary,) = watcher.summary().sources
    assert summary.frames.read == summary.frames.scored == 6
    assert value(watch, "meliad_frames_total", camera=summary.name, outcome="scored") == 6
    assert value(watch, "meliad_frames_total", camera=summary.name, outcome="bad") == 1
    assert value(watch, "meliad_anomaly_events_total", camera=summary.name) == summary.events == 2


def test_the_page_about_plants_names_metrics_that_exist(watch: Any, pictures: Any) -> None:
    watch.decide("belt", pictures(40))
    watch.sinks.append(SinkStatus("folder", 0, 0))
    named = set(re.findall(r"`(meliad_\w+)`", (Path(__file__).parents[2] / "docs" / "plant.md").read_text()))
    exported = {sample.name.removesuffix("_bucket") for family in families(watch).values() for sample in family.samples}
    assert named and named <= exported


def test_the_dashboard_asks_for_metrics_that_exist(watch: Any, pictures: Any) -> None:
    watch.decide("belt", pictures(40))
    watch.sinks.append(SinkStatus("folder", 0, 0))
    exposed = {sample.name for family in families(watch).values() for sample in family.samples}
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [entry["query"] for entry in dashboard["templating"]["list"] if entry["type"] == "query"]
    asked = {name for text in expressions for name in re.findall(r"\b(?:meliad|process)_\w+", text)}
    assert len(asked) > 15
    assert asked <= exposed
    ours = {
        name for name in exposed if name.startswith("meliad_") and not name.endswith(("_created", "_sum", "_count"))
    }
    assert asked >= ours, "every metric of ours is on the dashboard"
