from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from meliad_edge.events import EventKind
from meliad_edge.monitor.board import ScorePoint
from meliad_edge.monitor.liveness import STALLED_AFTER_S, Liveness
from meliad_edge.monitor.web.cameras import thin
from meliad_edge.runtime.view import Box, View
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.reader import ReaderState
from meliad_edge.stream.watcher import Camera, Watcher


def status(watch: Any, name: str) -> Any:
    return {status.name: status for status in watch.board.statuses()}[name]


def test_a_camera_stands_as_its_frames_and_events_say(watch: Any, pictures: Any) -> None:
    before = status(watch, "belt")
    assert (before.latest, before.fps, before.anomaly, before.capture_to_decision) == (None, 0.0, None, None)
    decision = watch.decide("belt", pictures(40), latency_s=0.03)
    event = watch.begin_anomaly("belt")
    after = status(watch, "belt")
    assert (after.anomaly, after.events, after.condition, after.drift) == (event.id, 1, "", "")
    assert after.latest is not decision
    assert after.capture_to_decision.count == 2
    assert after.address == "rtsp://10.0.0.0/live"
    watch.end(event)
    assert (status(watch, "belt").anomaly, status(watch, "belt").events) == (None, 1)


def test_condition_and_drift_are_told_apart(watch: Any) -> None:
    frozen = watch.begin_condition("belt", EventKind.CAMERA, "frozen", "the same picture for 12 s")
    watch.begin_condition("belt", EventKind.DRIFT, "higher", "1.8 spreads")
    belt = status(watch, "belt")
    assert (belt.condition, belt.condition_detail) == ("frozen", "the same picture for 12 s")
    assert (belt.drift, belt.drift_detail) == ("higher", "1.8 spreads")
    assert belt.anomaly is None
    watch.end(frozen)
    assert (status(watch, "belt").condition, status(watch, "belt").drift) == ("", "higher")


def test_the_frame_rate_is_that_of_the_last_ten_seconds(watch: Any, pictures: Any) -> None:
    for _ in range(5):
        watch.decide("belt", pictures(40))
    assert status(watch, "belt").fps == pytest.approx(4.0), "from the start on, not only after ten seconds"
    for _ in range(100):
        watch.decide("belt", pictures(40))
    assert status(watch, "belt").fps == pytest.approx(4.0, abs=0.11)
    watch.now_s += 5.0
    assert status(watch, "belt").fps == pytest.approx(2.0, abs=0.11)
    watch.now_s += 60.0
    assert status(watch, "belt").fps == 0.0


def test_the_history_keeps_the_highest_score_of_each_second(watch: Any, pictures: Any) -> None:
    watch.wall_s = 1_790_000_000.0 - 0.25
    for level in (40, 200, 60, 50, 30, 20, 10, 35):  # four a second
        watch.decide("belt", pictures(level))
    points = watch.board.scores("belt")
    assert [point.score for point in points] == [200.0, 35.0]
    assert [point.time_s for point in points] == [1_790_000_000.25, 1_790_000_001.75]
    assert watch.board.scores("belt", since_s=1_790_000_001.0) == points[1:]


def test_a_score_that_is_not_a_number_stays_in_the_history(watch: Any, pictures: Any) -> None:
    watch.wall_s = 1_790_000_000.0 - 0.25
    watch.predictor.engine.is_broken = True
    watch.decide("belt", pictures(40))
    watch.predictor.engine.is_broken = False
    watch.decide("belt", pictures(250))
    (point,) = watch.board.scores("belt")
    assert math.isnan(point.score)


def test_the_history_is_bounded(watch: Any, pictures: Any) -> None:
    image = pictures(40, size_hw=(8, 8))
    for _ in range(3700):
        watch.wall_s += 1.0
        watch.decide("belt", image)
    assert len(watch.board.scores("belt")) == 3600


@pytest.mark.parametrize(("count", "most", "expected"), [(5, 10, 5), (10, 5, 5), (11, 5, 4), (3600, 600, 600)])
def test_thinning_keeps_every_peak(count: int, most: int, expected: int) -> None:
    points: Sequence[ScorePoint] = [ScorePoint(float(i), 1.0, 5.0) for i in range(count)]
    peak = ScorePoint(count - 2.5, 9.0, 5.0)
    thinned = thin([*points[:-2], peak, points[-1]], most)
    assert peak in thinned
    assert len(thinned) == expected <= most
    assert [point.time_s for point in thinned] == sorted(point.time_s for point in thinned)


def test_thinning_takes_what_is_not_a_number_for_the_highest() -> None:
    broken = ScorePoint(1.0, math.nan, 5.0)
    assert (
        thin([ScorePoint(0.0, 9.0, 5.0), broken, ScorePoint(2.0, 9.0, 5.0), ScorePoint(3.0, 1.0, 5.0)], 2)[0] is broken
    )


def test_a_frame_that_nobody_takes_up_is_a_stall(watch: Any, hang: Callable[[Any], None]) -> None:
    liveness = Liveness(watch.board, clock=lambda: watch.now_s)
    assert liveness.is_alive, "before the watch has begun"
    hang(watch)
    watch.now_s += 2.0
    assert liveness.is_alive
    watch.now_s += STALLED_AFTER_S
    assert liveness.stalled_s() == pytest.approx(STALLED_AFTER_S)
    watch.now_s += 1.0
    assert not liveness.is_alive
    watch.readers["belt"].stale = 1  # one was taken up, and was too old
    watch.now_s += 1.0
    assert liveness.is_alive


def test_a_camera_that_is_lost_is_no_stall(watch: Any, hang: Callable[[Any], None]) -> None:
    liveness = Liveness(watch.board, clock=lambda: watch.now_s)
    hang(watch)
    for reader in watch.readers.values():
        reader.state = ReaderState.WAITING
        reader.read = reader.stale = 7
    for _ in range(10):
        watch.now_s += STALLED_AFTER_S
        assert liveness.is_alive


def test_frames_that_do_not_fit_the_view_are_no_stall(watch: Any, pictures: Any) -> None:
    reader = watch.readers["belt"]
    watcher = watch.board.watcher = Watcher(
        watch.predictor,
        [Camera(reader, view=View(region=Box(0, 0, 500, 500)))],
        on_event=watch.publish,
        on_notice=watch.board.record_notice,
        on_failure=lambda name, error: None,
    )
    liveness = Liveness(watch.board, clock=lambda: watch.now_s)
    for number in range(3):
        reader._put(Frame("belt", number, time.monotonic(), pictures(40), 0.001))
        assert watcher._take_turns(1) == []
        watch.now_s += STALLED_AFTER_S
        assert liveness.is_alive
    assert watcher.summary().frames.misfit == 3


def test_a_first_frame_after_a_long_silence_is_no_stall(watch: Any, hang: Callable[[Any], None]) -> None:
    liveness = Liveness(watch.board, clock=lambda: watch.now_s)
    hang(watch)
    watch.readers["belt"].read = 0
    assert liveness.is_alive
    watch.now_s += 3600.0
    watch.readers["belt"].read = 1
    assert liveness.is_alive
