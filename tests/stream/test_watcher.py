from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from meliad_edge.errors import MeliadError, SourceError
from meliad_edge.events import Event, EventState, Window
from meliad_edge.stream.reader import Reader, ReaderState
from meliad_edge.stream.sources import open_source
from meliad_edge.stream.uri import parse_source
from meliad_edge.stream.watcher import Watcher

WriteVideo = Callable[..., Path]
GOOD, BAD = 20, 200


class Watched:
    """A watcher and all that it reported."""

    def __init__(self, predictor: Any, *sources: object, **options: Any) -> None:
        self.events: list[Event] = []
        self.notices: list[tuple[str, str]] = []
        self.failures: list[tuple[str, MeliadError]] = []
        self.readers: list[Reader] = [open_source(parse_source(str(source))) for source in sources]
        self.watcher = Watcher(
            predictor,
            self.readers,
            on_event=self.events.append,
            on_notice=lambda name, text: self.notices.append((name, text)),
            on_failure=lambda name, error: self.failures.append((name, error)),
            **options,
        )


def test_an_anomaly_in_a_video_is_one_event(write_video: WriteVideo, predictor: Any) -> None:
    levels = [GOOD] * 10 + [BAD - 20, BAD, BAD - 10, BAD - 30] + [GOOD] * 10
    watched = Watched(predictor, write_video("belt.avi", levels))
    watched.watcher.run()
    new, end = watched.events
    assert (new.state, new.first_frame, new.last_frame) == (EventState.NEW, 10, 12)
    assert (end.state, end.first_frame, end.last_frame) == (EventState.END, 10, 13)
    assert end.frame.id == 11
    assert end.peak_score == pytest.approx(BAD, abs=2)
    assert end.id == new.id == 1
    summary = watched.watcher.summary()
    assert (summary.frames.read, summary.frames.scored, summary.events) == (24, 24, 1)


def test_one_bad_frame_is_no_event_unless_the_window_says_so(write_video: WriteVideo, predictor: Any) -> None:
    path = write_video("belt.avi", [GOOD] * 5 + [BAD] + [GOOD] * 5)
    watched = Watched(predictor, path)
    watched.watcher.run()
    assert watched.events == []
    watched = Watched(predictor, path, window=Window(1, 1))
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
        (1, "new", "0.png"), (1, "end", "0.png"), (2, "new", "1.png"), (2, "end", "1.png"),
        (3, "new", "3.png"), (3, "end", "3.png"),
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


def test_stops_after_max_frames_and_ends_what_is_open(write_video: WriteVideo, predictor: Any) -> None:
    watched = Watched(predictor, write_video("a.avi", [BAD] * 90))
    watched.watcher.run(max_frames=7)
    assert len(predictor.images) == watched.watcher.summary().frames.scored == 7
    assert watched.events[-1].state is EventState.END
    assert not any(reader._thread.is_alive() for reader in watched.readers)


def test_an_interrupt_ends_readers_and_events_and_leaves_the_summary(write_video: WriteVideo, predictor: Any) -> None:
    def interrupt() -> None:
        if len(predictor.images) == 5:
            raise KeyboardInterrupt

    watched = Watched(predictor, write_video("a.avi", [BAD] * 90), on_frame=interrupt)
    with pytest.raises(KeyboardInterrupt):
        watched.watcher.run()
    assert watched.events[-1].state is EventState.END
    assert watched.watcher.summary().frames.scored == 5
    assert not any(reader._thread.is_alive() for reader in watched.readers)


def test_a_bug_in_a_reader_is_not_swallowed(
    write_video: WriteVideo, predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(predictor, write_video("a.avi", [GOOD] * 3))
    monkeypatch.setattr(watched.readers[0], "_read_frames", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        watched.watcher.run()


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
