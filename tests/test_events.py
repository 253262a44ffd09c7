from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meliad_edge.errors import UsageError
from meliad_edge.events import (
    ConditionTracker,
    Event,
    EventKind,
    EventState,
    EventTracker,
    Moment,
    NewId,
    Window,
    new_event_id,
)
from meliad_edge.runtime.predictor import Prediction, StageTimes
from meliad_edge.stream.frames import Frame

THRESHOLD = 1.0


def numbered(ids: Iterator[int] | None = None) -> NewId:
    numbers = ids or count(1)
    return lambda started: str(next(numbers))


def observe(tracker: EventTracker, frame_id: int, score: float) -> Event | None:
    frame = Frame("belt", frame_id, frame_id / 10, np.zeros((1, 1, 3), np.uint8), 0.0, 1000.0 + frame_id)
    prediction = Prediction(score, THRESHOLD, np.zeros((1, 1), np.float32), (), StageTimes(0.0, 0.0, 0.0))
    return tracker.update(frame, prediction)


def run(scores: list[float], window: Window) -> list[tuple[int, Event]]:
    """State changes with the index of the frame that caused them; the end of the source is one index further."""
    tracker = EventTracker("belt", window, new_id=numbered())
    changes = [(i, event) for i, score in enumerate(scores) if (event := observe(tracker, i, score)) is not None]
    if (last := tracker.finish()) is not None:
        changes.append((len(scores), last))
    return changes


def peak(event: Event) -> float:
    assert event.peak_score is not None
    return event.peak_score


def states(scores: list[float], window: Window) -> list[tuple[int, str]]:
    return [(i, event.state.value) for i, event in run(scores, window)]


def test_three_of_five() -> None:
    window = Window(3, 5)
    assert states([2, 0, 2, 0, 0, 2, 0, 0, 0, 0], window) == []
    assert states([2, 0, 2, 0, 2, 0, 0, 0, 0, 0, 0], window) == [(4, "new"), (9, "end")]


def test_an_event_survives_a_short_gap_and_tells_of_a_higher_peak() -> None:
    changes = run([0, 2, 3, 2, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0], Window(3, 5))
    assert [(i, e.state.value, e.peak_score, e.frame and e.frame.id) for i, e in changes] == [
        (3, "new", 3, 2), (8, "update", 4, 8), (14, "end", 4, 8),
    ]  # fmt: skip
    end = changes[-1][1]
    assert (end.first_frame, end.last_frame) == (1, 9)
    assert (end.started, end.last_seen) == (Moment(0.1, 1001.0), Moment(0.9, 1009.0))


def test_a_score_at_the_threshold_is_anomalous() -> None:
    assert states([THRESHOLD], Window(1, 1)) == [(0, "new"), (1, "end")]


def test_nothing_from_before_a_finish_counts_after_it() -> None:
    tracker = EventTracker("belt", Window(2, 3))
    observe(tracker, 0, 2.0)
    assert tracker.finish() is None
    assert observe(tracker, 1, 2.0) is None


def test_trackers_can_share_their_numbers() -> None:
    ids = count(7)
    numbers = []
    for _ in range(2):
        event = observe(EventTracker("belt", Window(1, 1), new_id=numbered(ids)), 0, 2.0)
        assert event is not None
        numbers.append(event.id)
    assert numbers == ["7", "8"]


def test_ids_sort_by_time_and_are_unlike_within_a_moment() -> None:
    ids = [new_event_id(Moment(0.0, wall_s)) for wall_s in (0.25, 0.25, 61.0, 86_400.0)]
    assert ids[0].startswith("19700101T000000.250Z-")
    assert [name[:20] for name in ids] == sorted(name[:20] for name in ids)
    assert len(set(ids)) == 4


def see(tracker: ConditionTracker, condition: str, second: int) -> list[tuple[str, str, float]]:
    events = tracker.update(condition, f"{condition} since long", Moment(second, 1000.0 + second), None)
    return [(event.state.value, event.condition, event.last_seen.monotonic_s) for event in events]


def test_a_condition_that_lasts_is_one_event_and_another_one_ends_it() -> None:
    tracker = ConditionTracker("belt", EventKind.CAMERA, new_id=numbered())
    assert see(tracker, "", 0) == []
    assert see(tracker, "black", 1) == [("new", "black", 1)]
    assert see(tracker, "black", 2) == []
    assert tracker.condition == "black"
    assert see(tracker, "frozen", 3) == [("end", "black", 2), ("new", "frozen", 3)]
    assert see(tracker, "", 4) == [("end", "frozen", 3)]
    assert tracker.finish() is None


@pytest.mark.parametrize(("needed", "size"), [(0, 5), (6, 5), (-1, 1), (0, 0)])
def test_an_impossible_window_is_refused(needed: int, size: int) -> None:
    with pytest.raises(UsageError, match="N of M"):
        Window(needed, size)


windows = st.integers(1, 6).flatmap(lambda size: st.builds(Window, st.integers(1, size), st.just(size)))
score_lists = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0]), max_size=60)


@given(scores=score_lists, window=windows)
def test_states_follow_each_other_properly(scores: list[float], window: Window) -> None:
    current: Event | None = None
    for _, event in run(scores, window):
        if event.state is EventState.NEW:
            assert current is None
        else:
            assert current is not None
            assert (event.id, event.first_frame) == (current.id, current.first_frame)
            assert peak(event) >= peak(current)
            if event.state is EventState.UPDATE:
                assert peak(event) > peak(current)
        current = None if event.state is EventState.END else event
    assert current is None
    ids = [event.id for _, event in run(scores, window) if event.state is EventState.NEW]
    assert ids == [str(number) for number in range(1, len(ids) + 1)]


@given(scores=score_lists, window=windows)
def test_an_event_begins_exactly_when_n_of_m_frames_are_anomalous(scores: list[float], window: Window) -> None:
    changes = {i: event for i, event in run(scores, window) if i < len(scores)}
    is_open, fresh_from = False, 0
    for i in range(len(scores)):
        recent = [score >= THRESHOLD for score in scores[max(fresh_from, i + 1 - window.size) : i + 1]]
        state = changes[i].state if i in changes else None
        if is_open:
            assert (state is EventState.END) == (not any(scores[j] >= THRESHOLD for j in _last(i, window)))
        else:
            assert (state is EventState.NEW) == (sum(recent) >= window.needed)
        if state is EventState.END:
            is_open, fresh_from = False, i + 1
        elif state is EventState.NEW:
            is_open = True


def _last(i: int, window: Window) -> range:
    return range(max(0, i + 1 - window.size), i + 1)


@given(scores=score_lists, window=windows)
def test_the_end_tells_the_whole_event(scores: list[float], window: Window) -> None:
    for _, event in run(scores, window):
        if event.state is EventState.END:
            assert event.first_frame is not None and event.last_frame is not None and event.frame is not None
            span = scores[event.first_frame : event.last_frame + 1]
            assert event.peak_score == max(span)
            assert scores[event.frame.id] == event.peak_score
            assert scores[event.first_frame] >= THRESHOLD
            assert scores[event.last_frame] >= THRESHOLD
