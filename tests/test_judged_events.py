from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from meliad_edge.errors import DataError, UsageError
from meliad_edge.event_store import DATABASE, EventStore, Verdict
from meliad_edge.events import Event, EventKind, EventState, Moment, new_event_id
from meliad_edge.exemplars import Exemplar
from meliad_edge.judged_events import open_events, pixel_digest, read_judged
from meliad_edge.runtime.predictor import Prediction, Region, StageTimes
from meliad_edge.runtime.view import Box
from meliad_edge.sinks.folder import FolderSink
from meliad_edge.stream.frames import Frame

GRID = (8, 8)
SCRATCH = Exemplar("scratch", "007.png", 0, 0, 8, 8, np.zeros((8, 8, 3), np.uint8))


class Watch:
    """Events as a watch leaves them, judged as they come."""

    def __init__(self, folder: Path) -> None:
        self.store = EventStore(folder, clock=lambda: 0.0)
        self._sink = FolderSink(self.store, (0.0, 3.0))
        self._seed = 0

    def close(self) -> None:
        self._sink.close()

    def see(
        self,
        verdict: Verdict | None,
        *,
        image: NDArray[np.uint8] | None = None,
        camera: str = "cam3",
        source: str | None = None,
        began_s: float | None = None,
        lasted_s: float = 0.2,
        score: float = 1.5,
        area: Box | None = None,
        map_hw: tuple[int, int] = GRID,
        region: Region | None = None,
        kind: EventKind = EventKind.ANOMALY,
        state: EventState = EventState.END,
    ) -> Event:
        self._seed += 1
        if image is None:
            image = np.random.default_rng(self._seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        began = 60.0 * self._seed if began_s is None else began_s
        regions = () if region is None else (region,)
        prediction = Prediction(score, 0.8, np.zeros(map_hw, np.float32), regions, StageTimes(0, 0, 0), area)
        event = Event(
            id=new_event_id(Moment(began, began)),
            kind=kind,
            state=state,
            camera=camera,
            source=camera if source is None else source,
            started=Moment(began, began),
            last_seen=Moment(began + lasted_s, began + lasted_s),
            first_frame=0,
            last_frame=5,
            frame=Frame(camera, self._seed, began, image, 0.0),
            prediction=prediction,
        )
        self._sink.publish(event)
        self.store.judge(event.id, verdict)
        return event


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    watch = Watch(tmp_path / "events")
    yield watch
    watch.close()


def test_the_frame_that_was_scored_comes_back_with_what_was_said(watch: Watch) -> None:
    seen = watch.see(Verdict.CONFIRMED, region=Region(3, 4, 5, 6, 2.0, resembles=SCRATCH))
    other = watch.see(Verdict.REJECTED)
    watch.see(None)
    watch.see(Verdict.CONFIRMED, kind=EventKind.DRIFT)
    watch.see(Verdict.CONFIRMED, state=EventState.NEW)  # Its picture may still be replaced.
    judged = read_judged(watch.store, GRID)
    first, second = judged.pictures
    assert (first.event, first.verdict, first.resembles) == (seen.id, Verdict.CONFIRMED, "scratch")
    assert (first.score, first.threshold, first.camera) == (1.5, 0.8, "cam3")
    assert (second.event, second.verdict, second.resembles) == (other.id, Verdict.REJECTED, None)
    assert seen.frame is not None
    assert np.array_equal(first.read(), seen.frame.image)
    assert first.sha256 == pixel_digest(seen.frame.image) != second.sha256
    assert judged.left_out == {}


def test_a_frame_is_cut_to_the_region_that_was_watched(watch: Watch) -> None:
    seen = watch.see(Verdict.REJECTED, area=Box(20, 10, 30, 40))
    (picture,) = read_judged(watch.store, GRID).pictures
    assert seen.frame is not None
    assert picture.size_hw == (40, 30)
    assert np.array_equal(picture.read(), seen.frame.image[10:50, 20:50])


@pytest.mark.parametrize(
    ("region", "rows", "columns"),
    [
        (Region(22, 12, 4, 4, 2.0), slice(10, 30), slice(20, 35)),
        (Region(45, 12, 4, 4, 2.0), slice(10, 30), slice(35, 50)),
        (Region(22, 40, 4, 9, 2.0), slice(30, 50), slice(20, 35)),
        (Region(20, 10, 30, 40, 2.0), slice(30, 50), slice(35, 50)),
    ],
)
def test_of_tiles_the_one_with_the_strongest_region_is_taken(
    region: Region, rows: slice, columns: slice, watch: Watch
) -> None:
    seen = watch.see(Verdict.CONFIRMED, area=Box(20, 10, 30, 40), map_hw=(16, 16), region=region)
    (picture,) = read_judged(watch.store, GRID).pictures
    assert seen.frame is not None
    assert np.array_equal(picture.read(), seen.frame.image[rows, columns])


def test_events_of_one_part_are_one_sample(watch: Watch) -> None:
    first = watch.see(Verdict.CONFIRMED, began_s=100.0, score=1.0)
    best = watch.see(Verdict.CONFIRMED, began_s=100.9, score=2.0)
    apart = watch.see(Verdict.CONFIRMED, began_s=102.2, score=1.0)
    elsewhere = watch.see(Verdict.CONFIRMED, began_s=101.0, camera="cam4")
    other = watch.see(Verdict.REJECTED, began_s=101.0)
    judged = read_judged(watch.store, GRID)
    assert {picture.event for picture in judged.pictures} == {best.id, apart.id, elsewhere.id, other.id}
    assert judged.left_out == {first.id: f"the same part as {best.id}"}
    again = read_judged(watch.store, GRID, preferred={first.id})
    assert again.left_out == {best.id: f"the same part as {first.id}"}


def test_pictures_of_a_folder_are_parts_of_their_own_however_fast_they_are_scored(watch: Watch) -> None:
    for index in range(4):
        watch.see(Verdict.REJECTED, camera="parts", source=f"{index}.png", began_s=100.0 + index / 100, lasted_s=0.0)
    assert len(read_judged(watch.store, GRID).pictures) == 4


def test_one_picture_counts_once_and_a_contradiction_not_at_all(watch: Watch) -> None:
    twice, argued = (np.full((60, 80, 3), level, np.uint8) for level in (10, 20))
    first, second = (watch.see(Verdict.REJECTED, image=twice) for _ in range(2))
    pair = [watch.see(verdict, image=argued) for verdict in Verdict]
    judged = read_judged(watch.store, GRID)
    assert [picture.event for picture in judged.pictures] == [first.id]
    assert judged.left_out == {second.id: f"the same picture as {first.id}"} | {
        event.id: "the same picture was confirmed and rejected" for event in pair
    }


def test_what_cannot_be_used_is_named_and_the_rest_goes_on(watch: Watch) -> None:
    good = watch.see(Verdict.REJECTED)
    gone, damaged = watch.see(Verdict.REJECTED), watch.see(Verdict.REJECTED)
    (watch.store.event_folder(gone.id) / "frame.png").unlink()
    (watch.store.event_folder(damaged.id) / "frame.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    outside = watch.see(Verdict.REJECTED, area=Box(70, 0, 30, 40))
    foreign = watch.see(Verdict.REJECTED, map_hw=(12, 12))
    nowhere = watch.see(Verdict.REJECTED, map_hw=(16, 16))
    judged = read_judged(watch.store, GRID)
    assert [picture.event for picture in judged.pictures] == [good.id]
    expected = {gone: "does not exist", damaged: "frame.png", outside: "does not lie in the picture",
                foreign: "another model watched", nowhere: "marks no region"}  # fmt: skip
    assert judged.left_out.keys() == {event.id for event in expected}
    for event, part in expected.items():
        assert part in judged.left_out[event.id]


def test_nothing_judged(watch: Watch) -> None:
    watch.see(None)
    with pytest.raises(DataError, match="none of its events was confirmed or rejected"):
        read_judged(watch.store, GRID)


def test_more_events_than_a_page(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meliad_edge.judged_events._PAGE", 2)
    for _ in range(5):
        watch.see(Verdict.CONFIRMED)
    assert len(read_judged(watch.store, GRID).pictures) == 5


def test_a_folder_without_events_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no events"):
        open_events(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_events_of_another_version_are_refused(watch: Watch) -> None:
    folder = watch.store.folder
    watch.store.close()
    with sqlite3.connect(folder / DATABASE) as database:
        database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(UsageError, match="holds events of version 9, this version reads 1"):
        open_events(folder)


def test_a_digest_is_of_pixels_and_shape() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert pixel_digest(image) == pixel_digest(image.copy())
    assert pixel_digest(image) != pixel_digest(image.reshape(4, 2, 3))
    assert pixel_digest(image[:, ::2]) == pixel_digest(np.ascontiguousarray(image[:, ::2]))
