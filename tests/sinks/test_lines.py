from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime

from meliad_edge.events import Event, EventKind, EventState
from meliad_edge.sinks.lines import LineSink, describe_as_json, describe_for_people

MakeEvent = Callable[..., Event]


def test_the_line_for_people(make_event: MakeEvent) -> None:
    event = make_event()
    local_time = datetime.fromtimestamp(event.started.wall_s).strftime("%H:%M:%S")
    assert describe_for_people(event) == (
        f"{local_time}  ANOMALY  line 3/belt.mp4  score 1.92 (threshold 0.83)  region 412,233 58x40 (+1)  "
        "like 'crack' (exp3_num_77744.jpg)"
    )


def test_the_line_of_a_condition_names_it_by_its_kind(make_event: MakeEvent) -> None:
    line = describe_for_people(make_event(kind=EventKind.CAMERA, condition="frozen"))
    assert line[8:].startswith("  CAMERA  line 3/belt.mp4")
    assert "score" not in line


def test_an_event_is_announced_once(make_event: MakeEvent) -> None:
    lines: list[str] = []
    sink = LineSink(lines.append, describe_as_json)
    for state in EventState:
        sink.publish(make_event(state))
    (line,) = lines
    record = json.loads(line)
    assert (record["type"], record["state"], record["event"]) == ("event", "new", make_event().id)
    assert (record["first_frame"], record["last_frame"], record["peak_frame"]) == (10, 12, 12)
    assert (record["score"], record["threshold"]) == (1.92, 0.83)
    assert (record["started"], record["last_seen"]) == (
        "2026-09-21T14:13:21.000+00:00",
        "2026-09-21T14:13:23.000+00:00",
    )
    assert (record["started_s"], record["duration_s"]) == (1_790_000_001.0, 2.0)
    assert record["regions"][0]["resembles"] == {"defect": "crack", "source": "exp3_num_77744.jpg"}
