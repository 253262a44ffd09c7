from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from meliad_edge.errors import MeliadError, SourceError
from meliad_edge.events import Event, EventState, Window
from meliad_edge.runtime.view import Box, View
from meliad_edge.stream.backoff import Backoff
from meliad_edge.stream.camera import CameraReader
from meliad_edge.stream.capture import Capture, Grab
from meliad_edge.stream.failures import Failure, FailureKind
from meliad_edge.stream.files import FollowedImageReader
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.reader import Reader, ReaderState
from meliad_edge.stream.sources import open_source
from meliad_edge.stream.uri import parse_source
from meliad_edge.stream.watcher import Camera, Decision, Watcher

WriteVideo = Callable[..., Path]
GOOD, BAD = 20, 200


class Watched:
    """A watcher and all that it reported."""

    def __init__(self, predictor: Any, *sources: object, camera: dict[str, Any] | None = None, **options: Any) -> None:
        self.events: list[Event] = []
        self.notices: list[tuple[str, str]] = []
        self.failures: list[tuple[str, MeliadError]] = []
        self.readers: list[Reader] = [
            source if isinstance(source, Reader) else open_source(parse_source(str(source))) for source in sources
        ]
        self.cameras = [Camera(reader, **(camera or {})) for reader in self.readers]
        ids = count(1)
        self.watcher = Watcher(
            predictor,
            self.cameras,
            on_event=self.events.append,
            on_notice=lambda name, text: self.notices.append((name, text)),
            on_failure=lambda name, error: self.failures.append((name, error)),
            new_id=lambda started: str(next(ids)),
            **options,
        )


def test_an_anomaly_in_a_video_is_one_event(write_video: WriteVideo, predictor: Any) -> None:
    levels = [GOOD] * 10 + [BAD - 20, BAD, BAD - 10, BAD - 30] + [GOOD] * 10
    watched = Watched(predictor, write_video("belt.avi", levels))
    watched.watcher.run()
    new, end = watched.events
    assert (new.state, new.first_frame, new.last_frame) == (EventState.NEW, 10, 12)
    assert (end.state, end.first_frame, end.last_frame) == (EventState.END, 10, 13)
    assert end.frame is not None and end.frame.id == 11
    assert end.peak_score == pytest.approx(BAD, abs=2)
    assert end.id == new.id == "1"
    summary = watched.watcher.summary()
    assert (summary.frames.read, summary.frames.scored, summary.events) == (24, 24, 1)


def test_one_bad_frame_is_no_event_unless_the_window_says_so(write_video: WriteVideo, predictor: Any) -> None:
    path = write_video("belt.avi", [GOOD] * 5 + [BAD] + [GOOD] * 5)
    watched = Watched(predictor, path)
    watched.watcher.run()
    assert watched.events == []
    watched = Watched(predictor, path, camera={"window": Window(1, 1)})
    watched.watcher.run()
    assert [event.state for event in watched.events] == [EventState.NEW, EventState.END]


def test_an_event_that_is_open_when_the_video_ends_is_ended(write_video: WriteVideo, predictor: Any) -> None:
    watched = Watched(predictor, write_video("belt.avi", [BAD] * 4))
    watched.watcher.run()
    assert watched.events[-1].state is EventState.END


def test_every_anomalous_picture_is_an_event_of_its_own(tmp_path: Path, predictor: Any) -> None:
    for index, level in enumerate((BAD, BAD, GOOD, BAD)):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((9, 9, 3), level, np.uint8))
    watched = Watched(predictor, tmp_path)
    watched.watcher.run()
    assert [(e.id, e.state.value, e.source) for e in watched.events] == [
        ("1", "new", "0.png"), ("1", "end", "0.png"), ("2", "new", "1.png"), ("2", "end", "1.png"),
        ("3", "new", "3.png"), ("3", "end", "3.png"),
    ]  # fmt: skip


def test_sources_take_turns(write_video: WriteVideo, slow_predictor: Any) -> None:
    # The model is the bottleneck, so both sources always have a frame waiting.
    watched = Watched(slow_predictor, write_video("a.avi", [10] * 8), write_video("b.avi", [60] * 8))
    watched.watcher.run()
    levels = [round(float(image.mean()), -1) for image in slow_predictor.images]
    middle = levels[4:12]
    assert sorted(levels) == [10] * 8 + [60] * 8
    assert all(a != b for a, b in zip(middle, middle[1:], strict=False))


def test_a_failing_source_does_not_stop_the_others(write_video: WriteVideo, predictor: Any, tmp_path: Path) -> None:
    watched = Watched(predictor, tmp_path / "missing.mp4", write_video("b.avi", [GOOD] * 6))
    watched.watcher.run()
    ((name, error),) = watched.failures
    assert name == "missing.mp4"
    assert isinstance(error, SourceError)
    missing, good = watched.watcher.summary().sources
    assert (missing.state, missing.error, missing.frames.read) == (ReaderState.FAILED, error, 0)
    assert (good.state, good.error, good.frames.scored) == (ReaderState.ENDED, None, 6)


def absent_camera(name: str) -> CameraReader:
    """A camera that is never there, and waits next to no time between attempts."""
    return CameraReader(
        parse_source(f"rtsp://{name}/live"),
        backoff=Backoff(random.Random(0), first_s=0.001, cap_s=0.001),
        connect=lambda source: Failure(FailureKind.REFUSED, "connection refused"),
    )


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    limit_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit_s, "did not happen in time"
        time.sleep(0.005)


def test_a_camera_that_is_not_there_is_waited_for_while_another_delivers(predictor: Any) -> None:
    delivering, absent = ScriptedReader("a", time.monotonic), absent_camera("b")
    watched = Watched(predictor, delivering, absent)
    running = threading.Thread(target=watched.watcher.run)
    running.start()
    wait_until(lambda: absent.is_in_doubt)
    for frames in (1, 2):
        delivering.put(GOOD, time.monotonic())
        wait_until(lambda frames=frames: watched.watcher.scored == frames)  # type: ignore[misc]
    assert (watched.failures, absent.error) == ([], None)
    watched.watcher.stop()
    running.join(20)
    ((name, error),) = watched.failures  # What never came is told when all ends.
    assert (name, "connection refused" in str(error)) == (absent.source.name, True)
    assert [source.state for source in watched.watcher.summary().sources] == [ReaderState.ENDED, ReaderState.FAILED]


def test_cameras_that_are_not_there_are_given_up_when_nothing_delivers_any_more(
    write_video: WriteVideo, predictor: Any
) -> None:
    absent = [absent_camera("b"), absent_camera("c")]
    watched = Watched(predictor, write_video("a.avi", [GOOD] * 3), *absent)
    watched.watcher.run()
    assert watched.watcher.scored == 3
    assert sorted(name for name, _ in watched.failures) == sorted(camera.source.name for camera in absent)


def test_a_watch_that_waits_for_its_cameras_goes_on_until_one_is_there(predictor: Any) -> None:
    absent, late = absent_camera("b"), ScriptedReader("a", time.monotonic)
    late.is_in_doubt = True
    watched = Watched(predictor, absent, late)
    running = threading.Thread(target=lambda: watched.watcher.run(max_frames=1, waits_for_cameras=True))
    running.start()
    wait_until(lambda: absent.is_in_doubt)
    running.join(1.5)  # Longer than the frame loop waits before it looks again.
    assert running.is_alive() and watched.failures == []
    late.put(GOOD, time.monotonic())
    running.join(20)
    assert watched.watcher.scored == 1


def test_stops_after_max_frames_and_ends_what_is_open(write_video: WriteVideo, predictor: Any) -> None:
    watched = Watched(predictor, write_video("a.avi", [BAD] * 90))
    watched.watcher.run(max_frames=7)
    assert len(predictor.images) == watched.watcher.summary().frames.scored == 7
    assert watched.events[-1].state is EventState.END
    assert not any(reader._thread.is_alive() for reader in watched.readers)


def test_an_interrupt_ends_readers_and_events_and_leaves_the_summary(write_video: WriteVideo, predictor: Any) -> None:
    def interrupt(decision: Decision) -> None:
        if len(predictor.images) == 5:
            raise KeyboardInterrupt

    watched = Watched(predictor, write_video("a.avi", [BAD] * 90), on_decision=interrupt)
    with pytest.raises(KeyboardInterrupt):
        watched.watcher.run()
    assert watched.events[-1].state is EventState.END
    assert watched.watcher.summary().frames.scored == 5
    assert not any(reader._thread.is_alive() for reader in watched.readers)


def test_a_bug_in_a_reader_ends_its_camera_alone_and_is_not_swallowed(
    write_video: WriteVideo, predictor: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("rtsp://me:S3CR3T@cam/live")

    watched = Watched(predictor, "rtsp://cam/live", write_video("b.avi", [GOOD] * 6))
    monkeypatch.setattr(watched.readers[0], "_read_frames", fail)
    watched.watcher.run()
    ((name, error),) = watched.failures
    assert (name, str(error)) == ("cam/live", "rtsp://cam/live: failed with an unexpected ValueError; report it")
    assert isinstance(error.__cause__, ValueError)
    assert "in fail" in caplog.text and "S3CR3T" not in caplog.text
    assert [(event.condition, event.state) for event in watched.events] == [
        ("lost", EventState.NEW), ("lost", EventState.END)
    ]  # fmt: skip
    assert watched.watcher.summary().sources[1].frames.scored == 6
    caplog.clear()


def test_a_live_source_that_is_faster_than_the_model(mjpeg_server: Any, slow_predictor: Any) -> None:
    watched = Watched(slow_predictor, mjpeg_server.url)
    watched.watcher.run(max_frames=6)
    frames = watched.watcher.summary().frames
    assert frames.scored == 6
    assert frames.dropped > 6  # 50 frames a second, a model that takes ten
    assert 0 <= frames.read - frames.scored - frames.dropped - frames.stale <= 1


def test_the_stages_are_timed(write_video: WriteVideo, predictor: Any) -> None:
    watched = Watched(predictor, write_video("a.avi", [GOOD] * 20))
    watched.watcher.run()
    summary = watched.watcher.summary()
    assert {latency.count for latency in summary.latencies.values()} == {20}
    assert set(summary.latencies) == {
        "frame_to_decision", "preprocess", "infer", "post", "decode", "capture_to_decision"
    }  # fmt: skip
    assert summary.latencies["infer"].p99_s == 0.002
    assert summary.latencies["capture_to_decision"].p50_s >= summary.latencies["frame_to_decision"].p50_s
    assert summary.throughput_fps > 0


def test_what_waits_at_the_same_time_is_scored_together(write_video: WriteVideo, slow_predictor: Any) -> None:
    watched = Watched(
        slow_predictor, write_video("a.avi", [10] * 8), write_video("b.avi", [60] * 8), write_video("c.avi", [30] * 8),
        batch_size=2,
    )  # fmt: skip
    watched.watcher.run()
    assert len(slow_predictor.images) == 24
    assert max(slow_predictor.batches) == 2
    assert len(slow_predictor.batches) <= 16
    served = [source.frames.scored for source in watched.watcher.summary().sources]
    assert served == [8, 8, 8]


def test_max_frames_holds_in_batches_too(write_video: WriteVideo, slow_predictor: Any) -> None:
    watched = Watched(slow_predictor, *(write_video(f"{i}.avi", [10] * 8) for i in range(4)), batch_size=4)
    watched.watcher.run(max_frames=6)
    assert len(slow_predictor.images) == 6


class ScriptedReader(Reader):
    """A live source whose frames are put by hand."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        super().__init__(parse_source(f"rtsp://{name}/live"), clock=clock)

    def _read_frames(self) -> None:
        self._stopping.wait()

    def put(self, level: int, captured_s: float) -> None:
        self._put(Frame(self.source.name, self.read, captured_s, np.full((8, 8, 3), level, np.uint8), 0.0))


class Clock:
    """Monotonic seconds that pass only when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class TimedPredictor:
    """Takes some seconds of a clock for every call."""

    def __init__(self, clock: Clock, takes_s: float, predictor: Any) -> None:
        self._clock, self._takes_s, self._predictor = clock, takes_s, predictor

    def predict_all(self, views: Any) -> Any:
        self._clock.now_s += self._takes_s
        return self._predictor.predict_all(views)


def step(watcher: Watcher) -> int:
    """One round of the loop; returns how many frames were scored."""
    taken = watcher._take_turns(1)
    if taken:
        watcher._score(taken)
    return len(taken)


def by_hand(readers: Sequence[Reader], clock: Clock, predictor: Any, **options: Any) -> tuple[Watcher, list[Event]]:
    events: list[Event] = []
    watcher = Watcher(
        predictor,
        [Camera(reader, **options) for reader in readers],
        on_event=events.append,
        on_notice=lambda name, text: None,
        on_failure=lambda name, error: None,
        clock=clock,
    )
    return watcher, events


def test_under_overload_every_camera_gets_its_share_however_fast_it_is(predictor: Any) -> None:
    clock = Clock()
    readers = [ScriptedReader(f"cam{i}", clock) for i in range(4)]
    watcher, _ = by_hand(readers, clock, TimedPredictor(clock, 0.03, predictor))
    rates_fps = (25, 30, 50, 25)
    offered = [0, 0, 0, 0]
    while clock.now_s < 110.0:
        for i, reader in enumerate(readers):
            while offered[i] / rates_fps[i] <= clock.now_s - 100.0:
                reader.put(GOOD, 100.0 + offered[i] / rates_fps[i])
                offered[i] += 1
        step(watcher)
    shares = [source.frames.scored for source in watcher.summary().sources]
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == pytest.approx(10.0 / 0.03, abs=3)


def test_a_frame_that_cannot_keep_its_budget_is_given_up_for_the_next(predictor: Any) -> None:
    clock = Clock()
    reader = ScriptedReader("cam", clock)
    watcher, _ = by_hand([reader], clock, TimedPredictor(clock, 0.02, predictor), latency_budget_s=0.1)
    reader.put(GOOD, clock.now_s)
    assert step(watcher) == 1
    reader.put(GOOD, clock.now_s - 0.09)  # It would be decided on 0.11 s after its capture.
    assert step(watcher) == 0
    reader.put(GOOD, clock.now_s - 0.07)
    assert step(watcher) == 1
    frames = watcher.summary().frames
    assert (frames.read, frames.scored, frames.late, frames.missed) == (3, 2, 1, 0)


def test_a_budget_that_can_never_be_kept_is_missed_and_counted_not_shed(predictor: Any) -> None:
    clock = Clock()
    reader = ScriptedReader("cam", clock)
    watcher, _ = by_hand([reader], clock, TimedPredictor(clock, 0.2, predictor), latency_budget_s=0.1)
    for _ in range(5):
        reader.put(GOOD, clock.now_s)
        assert step(watcher) == 1
    frames = watcher.summary().frames
    assert (frames.scored, frames.late, frames.missed) == (5, 0, 5)


def test_a_camera_that_delivers_nothing_is_lost_until_it_does(predictor: Any) -> None:
    clock = Clock()
    reader = ScriptedReader("cam", clock)
    watcher, events = by_hand([reader], clock, predictor)
    reader.put(GOOD, clock.now_s)
    step(watcher)
    clock.now_s += 4.0
    step(watcher)
    assert events == []
    clock.now_s += 2.0
    step(watcher)
    step(watcher)
    assert [(e.kind.value, e.state.value, e.condition) for e in events] == [("camera", "new", "lost")]
    reader.put(GOOD, clock.now_s)
    step(watcher)
    assert [(e.state.value, e.condition) for e in events[1:]] == [("end", "lost")]


def test_a_followed_folder_that_cannot_be_listed_is_lost_until_it_can(predictor: Any, tmp_path: Path) -> None:
    clock = Clock()
    reader = FollowedImageReader(parse_source(str(tmp_path)), clock=clock)
    watcher, events = by_hand([reader], clock, predictor)
    reader.state = ReaderState.STREAMING
    clock.now_s += 3600.0
    step(watcher)
    assert events == []  # No picture came, and none need come.
    reader.alive_s = clock.now_s
    reader.state = ReaderState.WAITING
    for expected in ([], ["new"], ["new"]):
        clock.now_s += 3.0
        step(watcher)
        assert [event.state.value for event in events if event.condition == "lost"] == expected
    reader.state = ReaderState.STREAMING
    step(watcher)
    assert [event.state.value for event in events] == ["new", "end"]


class SteppedVideo:
    """A frame every second of a clock, before each of which something is done; lost after so many seconds."""

    announced_frames, description = None, "8x8"

    def __init__(self, clock: Clock, level: int, seconds: int, before: Callable[[], object]) -> None:
        self._clock, self._level, self._before = clock, level, before
        self._end_s = clock.now_s + seconds

    def read(self, is_wanted: Callable[[Grab], bool]) -> Capture | Failure | None:
        self._before()
        self._clock.now_s += 1.0
        now_s = self._clock.now_s
        if now_s > self._end_s:
            return Failure(FailureKind.ENDED, "the stream ended")
        if not is_wanted(Grab(now_s, now_s, None)):
            return None
        return Capture(np.full((8, 8, 3), self._level, np.uint8), now_s, now_s, now_s)

    def close(self) -> None:
        pass


def test_a_camera_of_which_few_frames_are_wanted_is_not_lost_between_them(predictor: Any) -> None:
    clock = Clock()
    reader = CameraReader(
        parse_source("rtsp://cam/live"),
        clock=clock,
        max_fps=0.1,
        wait=lambda delay_s: True,
        connect=lambda source: SteppedVideo(clock, BAD, 60, before=lambda: step(watcher)),
    )
    watcher, events = by_hand([reader], clock, predictor)
    reader._run()
    assert [(event.kind.value, event.state.value) for event in events] == [("anomaly", "new")]
    clock.now_s += 6.0
    reader.state = ReaderState.WAITING
    step(watcher)
    assert events[-2].condition == "lost"


class BlackMonitor:
    """Calls a frame below 5 black."""

    is_fit = True

    def update(self, frame: Frame) -> tuple[str, str]:
        self.is_fit = frame.image.mean() >= 5
        return ("", "") if self.is_fit else ("black", f"mean level {frame.image.mean():.0f}")


def test_what_a_blind_camera_shows_is_no_anomaly(predictor: Any) -> None:
    clock = Clock()
    reader = ScriptedReader("cam", clock)
    watcher, events = by_hand([reader], clock, predictor, monitor=BlackMonitor(), window=Window(1, 2))
    predictor_says_black_is_anomalous = {0: 500.0}
    original = predictor.predict_all

    def predict_all(views: Any) -> Any:
        return [replace(p, score=predictor_says_black_is_anomalous.get(int(p.score), p.score)) for p in original(views)]

    predictor.predict_all = predict_all
    for level in (GOOD, 0, 0, GOOD, BAD, 0):
        reader.put(level, clock.now_s)
        assert step(watcher) == 1
        clock.now_s += 0.1
    assert [(e.kind.value, e.state.value) for e in events] == [
        ("camera", "new"), ("camera", "end"), ("anomaly", "new"), ("camera", "new"), ("anomaly", "end"),
    ]  # fmt: skip


def test_a_camera_whose_resolution_leaves_its_view_is_not_judged_until_it_is_back(predictor: Any) -> None:
    clock = Clock()
    reader = ScriptedReader("cam", clock)
    watcher, events = by_hand([reader], clock, predictor, view=View(region=Box(0, 0, 8, 8)))
    other = ScriptedReader("cam2", clock)
    other_watcher, other_events = by_hand([other], clock, predictor, view=View(region=Box(4, 4, 8, 8)))
    for each, each_reader in ((watcher, reader), (other_watcher, other)):
        each_reader.put(BAD, clock.now_s)
        step(each)
    assert events == [] and watcher.summary().frames.scored == 1
    ((event),) = other_events
    assert (event.condition, event.state) == ("resolution", EventState.NEW)
    assert "does not lie in the picture, which is 8x8" in event.detail
    frames = other_watcher.summary().frames
    assert (frames.read, frames.scored, frames.misfit, frames.bad) == (1, 0, 1, 0)
