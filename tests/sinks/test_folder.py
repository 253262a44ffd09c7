from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from meliad_edge.errors import UsageError
from meliad_edge.event_store import EventStore
from meliad_edge.events import Event, EventKind, EventState
from meliad_edge.sinks.folder import FolderSink
from meliad_edge.sinks.sink import UnavailableError

RANGE = (0.0, 3.0)

MakeEvent = Callable[..., Event]


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_every_state_is_kept_and_a_picture_per_event(store: EventStore, make_event: MakeEvent) -> None:
    with closing(FolderSink(store, RANGE)) as sink:
        pictures = []
        folder = store.event_folder(make_event().id)
        for state, peak_frame in ((EventState.NEW, 12), (EventState.UPDATE, 40), (EventState.END, 200)):
            sink.publish(make_event(state, peak_frame=peak_frame))
            pictures.append((folder / "picture.jpg").read_bytes())
        sink.publish(make_event(number=2))
        records = read_log(store.folder)
        assert [(record["event"][-1], record["state"]) for record in records] == [
            ("1", "new"), ("1", "update"), ("1", "end"), ("2", "new")
        ]  # fmt: skip
        assert pictures[0] == pictures[1] != pictures[2]  # An update costs no picture; the end shows the peak.
        assert [event.state for event in store.events()] == ["new", "end"]
        assert [event.record for event in store.events()] == [records[3], records[2]]
        shown = cv2.imread(str(store.folder / records[2]["picture"]))
        assert shown.shape == (360, 640, 3)
        assert shown[300, 100] == pytest.approx([200, 200, 200], abs=3)
        # What was scored, for the next fit: without loss and without anything drawn on it.
        assert np.array_equal(cv2.imread(str(folder / "frame.png")), np.full((360, 640, 3), 200, np.uint8))


def test_the_picture_of_a_peak_that_stays_is_written_once(store: EventStore, make_event: MakeEvent) -> None:
    with closing(FolderSink(store, RANGE)) as sink:
        sink.publish(make_event())
        picture = store.event_folder(make_event().id) / "picture.jpg"
        picture.write_bytes(b"ours")
        sink.publish(make_event(EventState.END))
        assert picture.read_bytes() == b"ours"


def test_a_camera_without_a_picture_has_none(store: EventStore, make_event: MakeEvent) -> None:
    with closing(FolderSink(store, RANGE)) as sink:
        sink.publish(make_event(kind=EventKind.CAMERA, condition="lost", picture=False))
        (record,) = read_log(store.folder)
        assert "picture" not in record
        assert not store.event_folder(record["event"]).exists()


def test_a_folder_is_added_to_not_overwritten(tmp_path: Path, make_event: MakeEvent) -> None:
    for number in (1, 2):
        with closing(FolderSink(EventStore(tmp_path), RANGE)) as sink:
            sink.publish(make_event(number=number))
    assert len(read_log(tmp_path)) == 2
    store = EventStore(tmp_path)
    assert len(store.events()) == 2
    store.close()


def test_a_log_that_has_grown_large_makes_room(
    store: EventStore, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meliad_edge.sinks.folder._LARGEST_LOG_BYTES", 1000)
    with closing(FolderSink(store, RANGE)) as sink:
        for number in range(1, 6):
            sink.publish(make_event(number=number))
        sizes = {path.name: path.stat().st_size for path in store.folder.glob("*.jsonl")}
        assert sizes.keys() == {"events.jsonl", "events.1.jsonl"}
        assert max(sizes.values()) < 2000
        assert len(store.events()) == 5


def test_a_store_that_cannot_be_written_is_not_there_now(
    store: EventStore, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        msg = "database or disk is full"
        raise sqlite3.OperationalError(msg)

    with closing(FolderSink(store, RANGE)) as sink:
        with monkeypatch.context() as patch:
            patch.setattr(store, "write", fail)
            with pytest.raises(UnavailableError, match="disk is full"):
                sink.publish(make_event())
        assert read_log(store.folder) == []
        sink.publish(make_event())  # Offered again, with its picture.
        assert (store.event_folder(make_event().id) / "picture.jpg").exists()


def test_a_log_that_cannot_be_opened_is_refused(store: EventStore) -> None:
    (store.folder / "events.jsonl").mkdir()
    with pytest.raises(UsageError, match=r"--out .*: cannot be written \(Is a directory\)"):
        FolderSink(store, RANGE)
