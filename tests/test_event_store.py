from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from meliad_edge.errors import DataError, UsageError
from meliad_edge.event_retention import Retention
from meliad_edge.event_store import DATABASE, EventStore, Verdict

NOW_S = 1_790_000_000.0
HOUR_S, DAY_S = 3600.0, 86_400.0
LAMP = "https://lamp.example"
BELL = "mqtt://bell.example"

# Writes events one after the other, each new, then updated, then ended, and says on a line what has returned.
WRITER = """
import itertools, json, sys
from pathlib import Path
from meliad_edge.event_store import EventStore

folder, camera, first, most = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = EventStore(folder, clock=lambda: 1_790_000_000.0)
if most == 0:
    store.end_interrupted()
for number in itertools.islice(itertools.count(first), most or None):
    event = f"20260921T141320.000Z-{number:06x}"
    for state in ("new", "update", "end"):
        record = {
            "event": event, "kind": "anomaly", "camera": camera, "state": state, "score": 1.5,
            "started_s": 1_790_000_000.0 + number, "last_seen_s": 1_790_000_001.0 + number,
        }
        content = f"{event} {state} ".encode() * 2000
        store.write(record, {} if state == "update" else {"picture.jpg": content, "frame.png": content})
        print(json.dumps([event, state]), flush=True)
"""


def event_id(number: int) -> str:
    return f"20260921T141320.000Z-{number:06x}"


def make_record(number: int, state: str = "new", **changes: Any) -> dict[str, Any]:
    return {
        "event": event_id(number),
        "kind": "anomaly",
        "camera": "belt",
        "state": state,
        "started_s": NOW_S + number,
        "last_seen_s": NOW_S + number + 1.0,
        "score": 1.5,
        **changes,
    }


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., EventStore]]:
    opened = []

    def open_in(folder: Path = tmp_path / "events", **options: Any) -> EventStore:
        opened.append(EventStore(folder, clock=options.pop("clock", lambda: NOW_S), **options))
        return opened[-1]

    yield open_in
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., EventStore]) -> EventStore:
    return open_store()


OpenStore = Callable[..., EventStore]


def ids(store: EventStore, **filters: Any) -> list[int]:
    return [int(event.id[-6:], 16) for event in store.events(**filters)]


def folders(store: EventStore) -> set[str]:
    return {path.name for path in store.folder.iterdir() if path.is_dir()}


def integrity(store: EventStore) -> str:
    with closing(sqlite3.connect(store.folder / DATABASE)) as database:
        (answer,) = database.execute("PRAGMA integrity_check").fetchone()
        return str(answer)


def test_an_event_is_as_it_was_written_last(store: EventStore) -> None:
    store.write(make_record(1, score=1.5), {"picture.jpg": b"first", "frame.png": b"frame"})
    store.write(make_record(1, "update", score=2.5, last_seen_s=NOW_S + 7.0), {})
    record = make_record(1, "end", score=2.5, last_seen_s=NOW_S + 9.0, regions=[{"x": 1}])
    store.write(record, {"picture.jpg": b"last"})
    event = store.event(event_id(1))
    assert event is not None
    assert (event.kind, event.camera, event.state, event.score) == ("anomaly", "belt", "end", 2.5)
    assert (event.started_s, event.last_seen_s) == (NOW_S + 1, NOW_S + 9.0)
    assert event.record == record
    assert (event.verdict, event.judged_s) == (None, None)
    assert {path.name: path.read_bytes() for path in event.folder.iterdir()} == {
        "picture.jpg": b"last",
        "frame.png": b"frame",
    }
    assert store.event(event_id(2)) is None


def test_what_was_written_is_there_after_reopening(store: EventStore, open_store: OpenStore) -> None:
    store.write(make_record(1), {"picture.jpg": b"picture"})
    before = store.event(event_id(1))
    store.close()
    assert open_store().event(event_id(1)) == before


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_a_score_that_is_no_number_is_null_everywhere(store: EventStore, score: float | None) -> None:
    store.write(make_record(1, score=score), {})
    event = store.event(event_id(1))
    assert event is not None
    assert event.score is None
    assert event.record["score"] is None


def test_events_come_newest_first_and_in_pages(store: EventStore) -> None:
    for number in (3, 1, 2):
        store.write(make_record(number), {})
    store.write(make_record(4, started_s=NOW_S + 2), {})  # In the same moment as 2.
    assert ids(store) == [3, 4, 2, 1]
    assert ids(store, limit=2) == [3, 4]
    assert ids(store, limit=2, before=event_id(4)) == [2, 1]
    assert ids(store, before=event_id(1)) == []


def test_events_can_be_filtered(store: EventStore) -> None:
    store.write(make_record(1), {})
    store.write(make_record(2, camera="lid"), {})
    store.write(make_record(3, kind="camera", score=None), {})
    store.judge(event_id(2), Verdict.REJECTED)
    assert ids(store, camera="belt") == [3, 1]
    assert ids(store, kind="anomaly") == [2, 1]
    assert ids(store, verdict=Verdict.REJECTED) == [2]
    assert ids(store, verdict=Verdict.CONFIRMED) == []
    assert ids(store, camera="belt", kind="anomaly", before=event_id(3)) == [1]


def test_a_verdict_can_be_changed_and_taken_back(open_store: OpenStore) -> None:
    now_s = NOW_S + 10.0
    store = open_store(clock=lambda: now_s)
    store.write(make_record(1), {})
    judged = store.judge(event_id(1), Verdict.CONFIRMED)
    assert (judged.verdict, judged.judged_s) == (Verdict.CONFIRMED, NOW_S + 10.0)
    now_s = NOW_S + 20.0
    judged = store.judge(event_id(1), Verdict.REJECTED)
    assert (judged.verdict, judged.judged_s) == (Verdict.REJECTED, NOW_S + 20.0)
    judged = store.judge(event_id(1), None)
    assert (judged.verdict, judged.judged_s) == (None, None)


def test_a_later_state_leaves_the_verdict(store: EventStore) -> None:
    store.write(make_record(1), {})
    store.judge(event_id(1), Verdict.CONFIRMED)
    store.write(make_record(1, "end"), {})
    event = store.event(event_id(1))
    assert event is not None
    assert (event.state, event.verdict) == ("end", Verdict.CONFIRMED)


def test_what_is_no_event_is_refused(store: EventStore) -> None:
    with pytest.raises(DataError, match=f"no event {event_id(1)}"):
        store.judge(event_id(1), Verdict.CONFIRMED)
    for text in ("../outside", "..", "", event_id(1) + "/..", event_id(1) + "\n"):
        with pytest.raises(DataError, match="is not the id of an event"):
            store.event_folder(text)
        with pytest.raises(DataError):
            store.write(make_record(1, event=text), {"picture.jpg": b"x"})
    assert folders(store) == set()


class Clocks:
    """The clock of a device, which may be set, and the one that just goes on."""

    def __init__(self, wall_s: float = NOW_S) -> None:
        self.wall_s, self.monotonic_s = wall_s, 5.0

    def go_on(self, seconds: float) -> None:
        self.wall_s += seconds
        self.monotonic_s += seconds

    @property
    def options(self) -> dict[str, Callable[[], float]]:
        return {"clock": lambda: self.wall_s, "monotonic_clock": lambda: self.monotonic_s}


def test_age_removes_what_nobody_judged(open_store: OpenStore) -> None:
    clocks = Clocks()
    store = open_store(retention=Retention(max_age_s=DAY_S), **clocks.options)
    for number in (1, 2, 3):
        store.write(make_record(number, "end"), {"picture.jpg": b"x"})
    store.write(make_record(4), {"picture.jpg": b"x"})  # Still open.
    store.write(make_record(5, "end", last_seen_s=NOW_S + 9 * DAY_S), {})  # Lasted long.
    store.judge(event_id(2), Verdict.CONFIRMED)
    assert store.prune() == 0
    clocks.go_on(DAY_S + 3.5)  # Beyond the age of 1 and 2, not of 3.
    assert store.prune() == 1
    assert ids(store) == [5, 4, 3, 2]
    assert folders(store) == {event_id(number) for number in (2, 3, 4)}
    clocks.go_on(8 * DAY_S)
    assert store.prune() == 1
    assert ids(store) == [5, 4, 2]
    clocks.go_on(2 * DAY_S)
    assert store.prune() == 1
    assert ids(store) == [4, 2]


def test_a_clock_that_jumps_ahead_removes_nothing(open_store: OpenStore) -> None:
    clocks = Clocks()
    store = open_store(retention=Retention(max_age_s=DAY_S), **clocks.options)
    store.write(make_record(1, "end"), {"picture.jpg": b"x"})
    clocks.go_on(HOUR_S)
    for jump_s in (400 * DAY_S, -400 * DAY_S):
        clocks.wall_s += jump_s
        for _ in range(3):
            assert store.prune() == 0
            clocks.go_on(60.0)
    clocks.go_on(DAY_S)
    assert store.prune() == 1


def test_a_clock_that_is_wrong_at_the_start_removes_nothing_until_it_is_set(open_store: OpenStore) -> None:
    for start_s in (NOW_S + 400 * DAY_S, 0.0):  # As without a battery: somewhere, or 1970.
        clocks = Clocks(start_s)
        store = open_store(retention=Retention(max_age_s=DAY_S), **clocks.options)
        store.write(make_record(1, "end"), {})
        clocks.go_on(60.0)
        assert store.prune() == 0
        clocks.wall_s = NOW_S + 2 * DAY_S
        for _ in range(60):
            assert store.prune() == 0
            clocks.go_on(60.0)
        assert store.prune() == 1


def test_size_removes_the_oldest_and_judged_events_last(open_store: OpenStore) -> None:
    store = open_store(retention=Retention(max_bytes=250))
    for number in range(1, 6):
        store.write(make_record(number, "new" if number == 1 else "end"), {"picture.jpg": bytes(100)})
    store.judge(event_id(2), Verdict.REJECTED)
    assert store.prune() == 3  # 1 is open, 2 is judged.
    assert ids(store) == [2, 1]
    store.write(make_record(6, "end"), {"picture.jpg": bytes(50)})
    assert store.prune() == 0
    store.add_files(event_id(6), {"clip.jpg": bytes(60)})
    assert store.prune() == 1  # Of the two, the one that nobody judged.
    assert ids(store) == [2, 1]
    store.write(make_record(1, "update"), {"picture.jpg": bytes(300)})
    assert store.prune() == 1
    assert ids(store) == [1]  # Nothing else is left, and what is open stays.
    assert folders(store) == {event_id(1)}


def test_judged_events_leave_room_for_new_ones(open_store: OpenStore, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(retention=Retention(max_bytes=1000))
    for number in range(1, 11):
        store.write(make_record(number, "end"), {"picture.jpg": bytes(100)})
        store.judge(event_id(number), Verdict.CONFIRMED)
    assert store.prune() == 0
    assert caplog.text == ""
    for number in range(11, 14):
        store.write(make_record(number, "end"), {"picture.jpg": bytes(100)})
        assert store.prune() == 1
        assert ids(store, limit=1) == [number]
    assert ids(store) == list(range(13, 3, -1))
    assert "1 of the oldest judged events removed" in caplog.text
    caplog.clear()
    for number in range(14, 24):
        store.write(make_record(number, "end"), {"picture.jpg": bytes(100)})
        store.prune()
    # However many nobody looks at, they do not push out what was judged.
    assert ids(store) == [23, 22, 21, *range(10, 3, -1)]
    assert caplog.text == ""


def test_what_has_just_ended_is_not_the_first_to_go_whatever_the_clock_said(open_store: OpenStore) -> None:
    store = open_store(retention=Retention(max_bytes=250))
    store.write(make_record(1), {"picture.jpg": bytes(100)})  # Began first and lasts.
    store.write(make_record(2, "end"), {"picture.jpg": bytes(100)})
    store.write(make_record(1, "end"), {})
    store.write(make_record(3, "end", started_s=60.0, last_seen_s=61.0), {"picture.jpg": bytes(100)})  # In 1970.
    assert store.prune() == 1
    assert ids(store) == [1, 3]


def test_pictures_that_come_after_the_event_was_pruned_are_not_kept(open_store: OpenStore) -> None:
    store = open_store(retention=Retention(max_bytes=50))
    store.write(make_record(1, "end"), {"picture.jpg": bytes(100)})
    assert store.prune() == 1
    store.add_files(event_id(1), {"clip.jpg": bytes(10)})
    assert folders(store) == set()


def test_pictures_that_come_before_the_event_is_written_are_kept(store: EventStore) -> None:
    store.add_files(event_id(1), {"clip.jpg": b"clip"})
    store.write(make_record(1), {"picture.jpg": b"x"})
    assert {path.name for path in store.event_folder(event_id(1)).iterdir()} == {"clip.jpg", "picture.jpg"}


def test_replaced_pictures_count_once(open_store: OpenStore) -> None:
    store = open_store(retention=Retention(max_bytes=150))
    for state in ("new", "update", "end"):
        store.write(make_record(1, state), {"picture.jpg": bytes(100)})
    assert store.prune() == 0
    assert ids(store) == [1]


def test_nothing_but_events_is_removed(open_store: OpenStore) -> None:
    store = open_store(retention=Retention(max_bytes=0))
    store.write(make_record(1, "end"), {"picture.jpg": b"x"})
    for name in ("photos", "20260921T141320.000Z-00000g", "20260921"):
        (store.folder / name).mkdir()
        (store.folder / name / "mine.jpg").touch()
    assert store.prune() == 1
    store.end_interrupted()
    assert folders(store) == {"photos", "20260921T141320.000Z-00000g", "20260921"}


def test_what_was_open_is_ended_once(store: EventStore) -> None:
    store.undelivered(LAMP)
    store.write(make_record(1), {"picture.jpg": b"x"})
    store.write(make_record(2), {})
    store.write(make_record(2, "update", score=3.0), {})
    store.write(make_record(3, "end"), {})
    (store.folder / event_id(1) / ".frame.png.partial").write_bytes(b"ha")  # As a kill leaves it.
    (store.folder / event_id(9)).mkdir()
    (store.folder / event_id(9) / "picture.jpg").write_bytes(b"never committed")
    assert store.end_interrupted() == 2
    assert [event.state for event in store.events()] == ["end", "end", "end"]
    assert [event.record["state"] for event in store.events()] == ["end", "end", "end"]
    ended = [change.record for change in store.undelivered(LAMP)][-2:]
    assert ended == [make_record(1, "end"), make_record(2, "end", score=3.0)]
    assert folders(store) == {event_id(1)}
    assert [path.name for path in (store.folder / event_id(1)).iterdir()] == ["picture.jpg"]
    assert store.end_interrupted() == 0


def test_a_destination_gets_what_is_written_after_it_first_asked(store: EventStore) -> None:
    store.write(make_record(1), {})
    assert store.undelivered(LAMP) == []
    store.write(make_record(2), {})
    store.write(make_record(1, "end"), {"picture.jpg": b"x"})
    assert store.undelivered(BELL) == []
    store.write(make_record(2, "end"), {})
    changes = store.undelivered(LAMP)
    assert [(change.event, change.record["state"]) for change in changes] == [
        (event_id(2), "new"), (event_id(1), "end"), (event_id(2), "end")
    ]  # fmt: skip
    assert [change.before for change in changes] == [None, make_record(1), make_record(2)]
    assert changes[1].folder == store.event_folder(event_id(1))
    assert [change.sequence for change in changes] == sorted({change.sequence for change in changes})
    assert store.undelivered(LAMP, limit=2) == changes[:2]
    assert store.undelivered(BELL) == changes[2:]


def test_what_was_delivered_stays_delivered(store: EventStore, open_store: OpenStore) -> None:
    for destination in (LAMP, BELL):
        store.undelivered(destination)
    for number in range(1, 6):
        store.write(make_record(number), {})
    changes = store.undelivered(LAMP)
    store.set_delivered(LAMP, changes[1].sequence)
    store.close()
    store = open_store()
    assert store.undelivered(LAMP) == changes[2:]
    assert (store.pending(LAMP), store.pending(BELL), store.pending("nobody")) == (3, 5, 0)
    store.set_delivered(LAMP, changes[4].sequence)
    store.set_delivered(LAMP, changes[0].sequence)  # Never back.
    assert store.undelivered(LAMP) == []
    assert (store.pending(LAMP), store.pending(BELL)) == (0, 5)


def test_what_is_pruned_before_it_was_delivered_is_lost_and_counted(open_store: OpenStore) -> None:
    store = open_store(retention=Retention(max_changes=4))
    store.undelivered(LAMP)
    store.write(make_record(1), {})
    late = store.undelivered(LAMP)[0]
    for score in range(9):
        store.write(make_record(1, "update", score=float(score)), {})
    store.undelivered(BELL)
    assert store.lost(LAMP) == 0
    store.prune()
    assert store.lost(LAMP) == 6
    store.set_delivered(LAMP, late.sequence)  # It was on its way; that does not bring back the others.
    assert [change.record["score"] for change in store.undelivered(LAMP)] == [5.0, 6.0, 7.0, 8.0]
    assert store.pending(LAMP) == 4
    store.prune()
    assert (store.lost(LAMP), store.lost(BELL), store.lost("nobody")) == (6, 0, 0)


def test_the_end_of_an_event_that_is_kept_is_not_lost(open_store: OpenStore) -> None:
    store = open_store(retention=Retention(max_changes=4, max_bytes=900))
    store.undelivered(LAMP)
    for number, size in ((1, 100), (2, 800)):
        for state in ("new", "update", "end"):
            store.write(make_record(number, state), {"picture.jpg": bytes(size)})
    for number in range(3, 13):
        store.write(make_record(number), {})
    store.prune()
    changes = [(change.event, change.record["state"]) for change in store.undelivered(LAMP)]
    assert changes[:2] == [(event_id(1), "end"), (event_id(2), "end")]
    assert changes[2:] == [(event_id(number), "new") for number in range(3, 13)]
    assert store.lost(LAMP) == 4
    store.write(make_record(13, "end"), {"picture.jpg": bytes(700)})
    assert store.prune() == 2
    # What is gone leaves nothing behind.
    assert [change.event for change in store.undelivered(LAMP)] == [event_id(number) for number in range(3, 14)]
    assert store.lost(LAMP) == 6


def test_sequence_numbers_are_not_used_again_after_pruning(open_store: OpenStore) -> None:
    store = open_store(retention=Retention(max_changes=0))
    store.undelivered(LAMP)
    store.write(make_record(1), {})
    (change,) = store.undelivered(LAMP)
    store.set_delivered(LAMP, change.sequence)
    store.prune()
    store.write(make_record(2), {})
    (later,) = store.undelivered(LAMP)
    assert later.sequence > change.sequence
    assert store.lost(LAMP) == 0


def test_a_wait_ends_with_a_write_from_another_thread(store: EventStore) -> None:
    def write() -> None:
        store.write(make_record(1), {})
        store.close()

    writer = threading.Thread(target=write)
    revision = store.revision
    writer.start()
    store.wait(60.0, since=revision)
    assert store.event(event_id(1)) is not None
    writer.join()


def test_what_comes_between_looking_and_waiting_is_not_missed(store: EventStore) -> None:
    for act in (lambda: store.write(make_record(1), {}), store.wake, store.end_interrupted):
        revision = store.revision
        act()
        start_s = time.monotonic()
        store.wait(60.0, since=revision)
        assert time.monotonic() - start_s < 30.0


def test_a_wait_for_nothing_ends_with_the_time(store: EventStore) -> None:
    store.wake()
    store.wait(0.0)
    store.wait(0.0, since=store.revision)


@pytest.mark.parametrize("place", ["a file", "in a file"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot keep events"):
        EventStore(tmp_path / "file" / ("" if place == "a file" else "events"))


def test_a_store_of_a_later_version_is_refused(store: EventStore) -> None:
    store.close()
    with closing(sqlite3.connect(store.folder / DATABASE)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(UsageError, match="holds events of version 99, this version reads 1; give another folder"):
        EventStore(store.folder)


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / DATABASE
    file.write_bytes(b"precious" * 1000)
    with pytest.raises(UsageError, match="cannot keep events"):
        EventStore(tmp_path)
    assert file.read_bytes() == b"precious" * 1000


def start_writer(store: EventStore, camera: str, first: int, most: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.folder), camera, str(first), str(most)],
        stdout=subprocess.PIPE,
        text=True,
    )


def content(event: str, state: str) -> bytes:
    return f"{event} {state} ".encode() * 2000


def test_a_killed_process_loses_nothing_that_it_was_told_is_kept(store: EventStore) -> None:
    """A write that did not return may be there or not, but never in part."""
    store.undelivered(LAMP)
    random_source = random.Random(0)
    returned: dict[str, str] = {}
    for kill in range(8):
        with start_writer(store, "belt", first=1000 * kill) as writer:
            assert writer.stdout is not None
            for _ in range(random_source.randint(1, 40)):
                event, state = json.loads(writer.stdout.readline())
                returned[event] = state
            time.sleep(random_source.uniform(0.0, 0.02))  # Somewhere in a write, or between two.
            writer.send_signal(signal.SIGKILL)
            returned.update(json.loads(line) for line in writer.stdout)
        assert writer.returncode == -signal.SIGKILL
        assert integrity(store) == "ok"
        for event, state in returned.items():
            stored = store.event(event)
            assert stored is not None
            later = {"new": ["new", "update"], "update": ["update", "end"], "end": ["end"]}[state]
            assert stored.state in later or stored.state == "end"  # Ended as interrupted by the next process.
            for name in ("picture.jpg", "frame.png"):
                picture = (stored.folder / name).read_bytes()
                assert picture in {content(event, "new"), content(event, "end")}
                assert state != "end" or picture == content(event, "end")
    was_open = sum(event.state != "end" for event in store.events(limit=10_000))
    assert store.end_interrupted() == was_open
    events = {event.id: event for event in store.events(limit=10_000)}
    assert {event.state for event in events.values()} == {"end"}
    assert returned.keys() <= events.keys()
    assert len(events) <= len(returned) + 8  # At most one per kill that was committed and not told.
    assert folders(store) == events.keys()
    assert not list(store.folder.glob("*/.*"))
    states: dict[str, list[str]] = {}
    for change in store.undelivered(LAMP, limit=100_000):
        states.setdefault(change.event, []).append(change.record["state"])
    whole = ["new", "update", "end"]
    assert states.keys() == events.keys()
    assert all(found in (whole, ["new", "end"]) for found in states.values())
    assert sum(found == whole for found in states.values()) >= len(states) - 8


def test_two_processes_write_and_read_at_once(store: EventStore) -> None:
    store.undelivered(LAMP)
    delivered: list[tuple[str, str]] = []
    last = 0

    def deliver() -> None:
        nonlocal last
        for change in store.undelivered(LAMP, limit=7):
            assert change.sequence > last
            last = change.sequence
            delivered.append((change.event, change.record["state"]))
            if change.record["state"] == "end":
                assert (change.folder / "picture.jpg").read_bytes() in {content(change.event, "end"), b"ours"}
            store.set_delivered(LAMP, last)

    with start_writer(store, "lid", first=5000, most=60) as writer:
        for number in range(60):
            for state in ("new", "update", "end"):
                store.write(make_record(number, state), {"picture.jpg": b"ours"})
                deliver()
        assert writer.stdout is not None
        assert len(writer.stdout.readlines()) == 180
        assert writer.wait() == 0
    while store.pending(LAMP):
        deliver()
    numbers = [*range(60), *range(5000, 5060)]
    assert sorted(ids(store, limit=1000)) == numbers
    assert len(ids(store, limit=1000, camera="lid")) == 60
    assert sorted(delivered) == sorted((event_id(n), state) for n in numbers for state in ("new", "update", "end"))
    assert integrity(store) == "ok"


def test_several_processes_may_make_the_same_store(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from meliad_edge.event_store import EventStore; "
        "[EventStore(Path(line.strip())).close() for line in sys.stdin]"
    )
    makers = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True, bufsize=1) for _ in range(3)
    ]
    for attempt in range(30):
        for maker in makers:
            assert maker.stdin is not None
            maker.stdin.write(f"{tmp_path / str(attempt)}\n")
    for maker in makers:
        maker.communicate()
    assert [maker.returncode for maker in makers] == [0, 0, 0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.name == "nt" or os.geteuid() != 0:
        pytest.skip("mounting a file system of its own needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True).returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(place: Path, *, leave_bytes: int) -> Path:
    filler = place / "filler"
    free = shutil.disk_usage(place).free
    filler.write_bytes(bytes(max(0, free - leave_bytes)))
    return filler


def test_a_full_disk_refuses_what_does_not_fit_and_keeps_what_was_there(
    small_disk: Path, open_store: OpenStore
) -> None:
    store = open_store(small_disk / "events")
    store.undelivered(LAMP)
    store.write(make_record(1), {"picture.jpg": b"first" * 1000, "frame.png": b"first" * 1000})
    filler = fill(small_disk, leave_bytes=150_000)
    # The first file fits, the second does not.
    with pytest.raises(OSError, match="No space left on device"):
        store.write(make_record(2), {"picture.jpg": bytes(100_000), "frame.png": bytes(100_000)})
    with pytest.raises(OSError, match="No space left on device"):
        store.write(make_record(1, "end"), {"picture.jpg": bytes(100_000), "frame.png": bytes(100_000)})
    with pytest.raises(OSError, match="No space left on device"):
        store.add_files(event_id(1), {"clip.jpg": bytes(200_000)})
    assert ids(store) == [1]
    assert folders(store) == {event_id(1)}
    assert {path.name: path.read_bytes() for path in (store.folder / event_id(1)).iterdir()} == {
        "picture.jpg": b"first" * 1000,
        "frame.png": b"first" * 1000,
    }
    filler.unlink()
    store.write(make_record(1, "end"), {"picture.jpg": bytes(100_000), "frame.png": bytes(100_000)})
    store.write(make_record(2), {"picture.jpg": bytes(100_000)})
    assert [(change.event, change.record["state"]) for change in store.undelivered(LAMP)] == [
        (event_id(1), "new"), (event_id(1), "end"), (event_id(2), "new")
    ]  # fmt: skip
    assert integrity(store) == "ok"


def test_a_database_that_cannot_grow_takes_nothing_in_part(small_disk: Path, open_store: OpenStore) -> None:
    store = open_store(small_disk / "events")
    store.undelivered(LAMP)
    filler = fill(small_disk, leave_bytes=64 * 1024)
    kept = 0
    with pytest.raises((sqlite3.Error, OSError), match=r"disk is full|disk I/O error|No space left"):
        while True:
            store.write(make_record(kept + 1, detail="x" * 3000), {"picture.jpg": b"x"} if kept % 2 else {})
            kept += 1
    assert kept > 0

    def check() -> None:
        assert ids(store, limit=1000) == list(range(kept, 0, -1))
        assert [change.event for change in store.undelivered(LAMP, limit=1000)] == [
            event_id(number) for number in range(1, kept + 1)
        ]
        assert folders(store) == {event_id(number) for number in range(2, kept + 1, 2)}

    check()
    filler.unlink()
    check()
    kept += 1
    store.write(make_record(kept), {"picture.jpg": b"x"} if kept % 2 == 0 else {})
    check()
    store.close()
    assert integrity(store) == "ok"


def test_one_watch_at_a_time_keeps_its_events_in_a_folder(tmp_path: Path) -> None:
    store = EventStore(tmp_path)
    hold = (
        "import sys; from pathlib import Path; from meliad_edge.event_store import EventStore\n"
        "with EventStore(Path(sys.argv[1])).claimed():\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another watch keeps its events there"), store.claimed():
            pass
        assert store.events() == []  # Everybody may look.
        other.kill()
        other.wait()
    with store.claimed():
        pass
