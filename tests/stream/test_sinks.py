from __future__ import annotations

import json
import threading
from datetime import datetime, timezone
from pathlib import Path

import cv2
import numpy as np
import pytest

from meliad_edge.bundle import Exemplar
from meliad_edge.errors import UsageError
from meliad_edge.events import Event, EventState
from meliad_edge.runtime.predictor import Prediction, Region, StageTimes
from meliad_edge.sinks.destinations import open_sink
from meliad_edge.sinks.folder import FolderSink
from meliad_edge.sinks.lines import LineSink, describe_as_json, describe_for_people
from meliad_edge.sinks.record import to_wall_time
from meliad_edge.sinks.sink import QueuedSink
from meliad_edge.stream.frames import Frame

RANGE = (0.0, 3.0)


def make_event(
    state: EventState = EventState.NEW, *, event_id: int = 1, peak_frame: int = 12, score: float = 1.92
) -> Event:
    crack = Exemplar("crack", "exp3_num_77744.jpg", 0, 0, 8, 8, np.zeros((48, 48, 3), np.uint8))
    regions = (Region(412, 233, 58, 40, 1.92, resembles=crack), Region(3, 4, 5, 6, 1.0))
    frame = Frame("line 3/belt.mp4", peak_frame, 12.0, np.full((360, 640, 3), peak_frame, np.uint8), 0.001)
    prediction = Prediction(score, 0.83, np.zeros((4, 4), np.float32), regions, StageTimes(0, 0, 0))
    return Event(event_id, state, frame.source, 10, peak_frame, 10.0, 12.0, frame, prediction)


class MemorySink:
    name = "memory"

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.gate = threading.Event()
        self.gate.set()
        self.is_closed = False

    def publish(self, event: Event) -> None:
        self.gate.wait(10)
        if event.id == 13:
            msg = "disk full"
            raise OSError(msg)
        self.events.append(event)

    def close(self) -> None:
        self.is_closed = True


def test_a_queued_sink_delivers_everything_in_order_before_it_closes() -> None:
    sink = MemorySink()
    queued = QueuedSink(sink)
    for event_id in range(1, 11):
        queued.publish(make_event(event_id=event_id))
    queued.close()
    assert [event.id for event in sink.events] == list(range(1, 11))
    assert sink.is_closed
    assert (queued.published, queued.delivered, queued.overflowed, queued.failed) == (10, 10, 0, 0)


def test_a_stuck_sink_never_holds_up_the_publisher_and_the_loss_is_counted() -> None:
    sink = MemorySink()
    sink.gate.clear()
    queued = QueuedSink(sink, capacity=4)
    for event_id in range(20, 40):
        queued.publish(make_event(event_id=event_id))  # Would never come back if it waited.
    assert queued.overflowed >= 15
    sink.gate.set()
    queued.close()
    assert queued.delivered + queued.overflowed == queued.published == 20


def test_closing_gives_up_on_a_sink_that_hangs() -> None:
    sink = MemorySink()
    sink.gate.clear()
    queued = QueuedSink(sink, capacity=1)
    for event_id in range(3):
        queued.publish(make_event(event_id=event_id))
    queued.close(timeout_s=0.05)
    assert queued.delivered == 0
    sink.gate.set()


def test_a_failing_sink_goes_on_with_the_next_event(caplog: pytest.LogCaptureFixture) -> None:
    sink = MemorySink()
    queued = QueuedSink(sink)
    for event_id in (12, 13, 14):
        queued.publish(make_event(event_id=event_id))
    queued.close()
    assert [event.id for event in sink.events] == [12, 14]
    assert queued.failed == 1
    assert "sink memory: OSError: disk full" in caplog.text


def test_the_line_for_people() -> None:
    noon = datetime(2026, 11, 22, 12, 3, 41).astimezone()
    assert describe_for_people(make_event(), lambda _: noon) == (
        "12:03:41  ANOMALY  line 3/belt.mp4  score 1.92 (threshold 0.83)  region 412,233 58x40 (+1)  "
        "like 'crack' (exp3_num_77744.jpg)"
    )


def test_an_event_is_announced_once() -> None:
    lines: list[str] = []
    sink = LineSink(lines.append, describe_as_json)
    for state in EventState:
        sink.publish(make_event(state))
    (line,) = lines
    record = json.loads(line)
    assert (record["type"], record["state"], record["event"]) == ("event", "new", 1)
    assert (record["first_frame"], record["last_frame"], record["peak_frame"]) == (10, 12, 12)
    assert (record["score"], record["threshold"]) == (1.92, 0.83)
    assert record["regions"][0]["resembles"] == {"defect": "crack", "source": "exp3_num_77744.jpg"}


def test_capture_times_become_dates() -> None:
    date = to_wall_time(90.0, wall=lambda: 1_000_000.0, monotonic=lambda: 100.0)
    assert date == datetime.fromtimestamp(999_990.0, tz=timezone.utc)


def test_a_folder_keeps_every_state_and_one_picture_per_event(tmp_path: Path) -> None:
    sink = FolderSink(tmp_path / "out", RANGE, to_wall_time=lambda s: datetime.fromtimestamp(s, tz=timezone.utc))
    pictures = []
    for state, peak_frame in ((EventState.NEW, 12), (EventState.UPDATE, 40), (EventState.END, 200)):
        sink.publish(make_event(state, peak_frame=peak_frame))
        (picture,) = (tmp_path / "out").glob("*.jpg")
        pictures.append(picture.read_bytes())
    sink.publish(make_event(EventState.NEW, event_id=2))
    sink.close()
    records = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert [(record["event"], record["state"]) for record in records] == [
        (1, "new"), (1, "update"), (1, "end"), (2, "new")
    ]  # fmt: skip
    assert records[0]["picture"] == records[2]["picture"] == "19700101T000010Z_line_3_belt.mp4_0001.jpg"
    assert pictures[0] == pictures[1] != pictures[2]  # An update costs no picture; the end shows the peak.
    shown = cv2.imread(str(tmp_path / "out" / records[2]["picture"]))
    assert shown.shape == (360, 640, 3)
    assert shown[300, 100] == pytest.approx([200, 200, 200], abs=3)


def test_a_folder_is_added_to_not_overwritten(tmp_path: Path) -> None:
    for _ in range(2):
        sink = open_sink(f"file://{tmp_path}/my%20runs", RANGE)
        sink.publish(make_event())
        sink.close()
    assert len((tmp_path / "my runs" / "events.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("destination", ["mqtt://me:S3CR3T@broker/topic", "https://host/hook", "file://"])
def test_other_destinations_are_refused(destination: str) -> None:
    with pytest.raises(UsageError, match="not supported in this version; give a folder") as caught:
        open_sink(destination, RANGE)
    assert "S3CR3T" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        open_sink(str(tmp_path / "file"), RANGE)
