"""Judged events of a watch as labelled pictures: one for each part, cut to what was judged of the frame."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meliad_edge.data.images import read_image
from meliad_edge.errors import DataError, ImageError, UsageError
from meliad_edge.event_store import DATABASE, EventStore, StoredEvent, Verdict
from meliad_edge.events import EventKind
from meliad_edge.runtime.view import Box, View

# An event that begins so soon after another one of its camera shows the same part, of which some frames passed.
_SAME_PART_S = 1.0
_PAGE = 500


@dataclass(frozen=True, slots=True)
class JudgedPicture:
    """The picture of an event that a person has judged.

    Attributes:
        event: Id of the event.
        verdict: What the person said.
        camera: Name of what was watched.
        score: Raw score that the watch gave it.
        threshold: The threshold it reached.
        resembles: Defect class that its strongest region was nearest to; None without one.
        frame: The whole frame that was scored.
        view: What of the frame was judged.
        tile: Which tile of the view has its strongest region.
        size_hw: Height and width of the picture in pixels.
        sha256: Of its size and pixels, see :func:`pixel_digest`.
    """

    event: str
    verdict: Verdict
    camera: str
    score: float | None
    threshold: float | None
    resembles: str | None
    frame: Path
    view: View
    tile: int
    size_hw: tuple[int, int]
    sha256: str

    def read(self) -> NDArray[np.uint8]:
        """The picture, uint8 RGB [H, W, 3].

        Raises:
            ImageError: The frame cannot be read.
        """
        return self.view.cut(read_image(self.frame))[self.tile]


@dataclass(frozen=True, slots=True)
class JudgedPictures:
    """The usable pictures of a watch, and why the others are not.

    Attributes:
        pictures: Sorted by event, no two of them alike.
        left_out: Reason by event.
    """

    pictures: tuple[JudgedPicture, ...]
    left_out: Mapping[str, str]


def open_events(folder: Path) -> EventStore:
    """Open the folder of a watch.

    Raises:
        DataError: It holds no events.
        UsageError: It holds events of another version.
    """
    if not (folder / DATABASE).is_file():
        msg = f"{folder}: no events (no {DATABASE}); name the folder that was given to watch --out"
        raise DataError(msg)
    return EventStore(folder)


def read_judged(
    store: EventStore, grid_hw: tuple[int, int], *, preferred: Container[str] = frozenset()
) -> JudgedPictures:
    """Read the picture of every anomaly event that ended and was judged.

    Events that follow each other within a second on one camera, with one verdict, are one part: the picture of the
    highest score stands for it. Of pictures that are alike to the last pixel the first stands for all, unless they were
    judged differently: then none does.

    Args:
        store: The events.
        grid_hw: Rows and columns of the model's map, which tell a tile from the whole.
        preferred: Events that stand for their part whatever their score, because they are in use already.

    Raises:
        DataError: No event was judged.
    """
    left_out: dict[str, str] = {}
    read: list[JudgedPicture] = []
    judged = [event for verdict in Verdict for event in _ended(store, verdict)]
    if not judged:
        msg = (
            f"{store.folder}: none of its events was confirmed or rejected, so there is nothing to learn from; "
            "judge some of them first"
        )
        raise DataError(msg)
    for part in _parts(judged):
        shown = max(part, key=lambda event: (event.id in preferred, -np.inf if event.score is None else event.score))
        left_out |= {event.id: f"the same part as {shown.id}" for event in part if event is not shown}
        try:
            read.append(_read(shown, grid_hw))
        except (ImageError, DataError, UsageError) as error:
            left_out[shown.id] = str(error)
    alike: dict[str, list[JudgedPicture]] = defaultdict(list)
    for picture in sorted(read, key=lambda picture: picture.event):
        alike[picture.sha256].append(picture)
    kept = []
    for first, *others in alike.values():
        if any(other.verdict is not first.verdict for other in others):
            left_out |= {p.event: "the same picture was confirmed and rejected" for p in (first, *others)}
        else:
            kept.append(first)
            left_out |= {other.event: f"the same picture as {first.event}" for other in others}
    return JudgedPictures(tuple(kept), dict(sorted(left_out.items())))


def pixel_digest(image: NDArray[np.uint8]) -> str:
    """SHA-256 of the size and pixels of an image, uint8 RGB [H, W, 3], whatever file they came from."""
    digest = hashlib.sha256(f"{image.shape[1]}x{image.shape[0]} ".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def _ended(store: EventStore, verdict: Verdict) -> Iterator[StoredEvent]:
    before: str | None = None
    while page := store.events(limit=_PAGE, before=before, kind=EventKind.ANOMALY.value, verdict=verdict):
        # The picture of an open event may still be replaced by one of a higher score.
        yield from (event for event in page if event.state == "end")
        before = page[-1].id


def _parts(events: Iterable[StoredEvent]) -> list[list[StoredEvent]]:
    """Events by the part that they show, oldest first."""
    parts: list[list[StoredEvent]] = []
    for event in sorted(events, key=lambda event: (event.camera, event.verdict is Verdict.REJECTED, event.started_s)):
        last = parts[-1][-1] if parts else None
        if last is not None and _is_same_part(last, event):
            parts[-1].append(event)
        else:
            parts.append([event])
    return parts


def _is_same_part(earlier: StoredEvent, later: StoredEvent) -> bool:
    # Every picture of a folder is a part of its own, however fast they were scored; its source is its file name.
    is_stream = later.record["source"] == later.camera
    is_alike = (earlier.camera, earlier.verdict) == (later.camera, later.verdict)
    return is_stream and is_alike and later.started_s - earlier.last_seen_s < _SAME_PART_S


def _read(event: StoredEvent, grid_hw: tuple[int, int]) -> JudgedPicture:
    assert event.verdict is not None
    record, frame = event.record, event.folder / "frame.png"
    image = read_image(frame)
    region = record.get("area")
    view = View(None if region is None else Box(*region), _tiles(record.get("grid"), grid_hw))
    area = view.area((image.shape[0], image.shape[1]))
    tile = _tile_of(record["regions"], view, area)
    picture = view.cut(image)[tile]
    resembles = record["regions"][0]["resembles"] if record["regions"] else None
    return JudgedPicture(
        event=event.id,
        verdict=event.verdict,
        camera=event.camera,
        score=event.score,
        threshold=record["threshold"],
        resembles=None if resembles is None else resembles["defect"],
        frame=frame,
        view=view,
        tile=tile,
        size_hw=(picture.shape[0], picture.shape[1]),
        sha256=pixel_digest(picture),
    )


def _tiles(joined_hw: Sequence[int] | None, grid_hw: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles behind a joined map; a record without its size is one of a whole frame."""
    if joined_hw is None:
        return 1, 1
    rows, columns = (joined // grid for joined, grid in zip(joined_hw, grid_hw, strict=True))
    if (rows * grid_hw[0], columns * grid_hw[1]) != tuple(joined_hw) or min(rows, columns) == 0:
        msg = (
            f"its map has {joined_hw[0]} x {joined_hw[1]} cells, those of the run {grid_hw[0]} x {grid_hw[1]}: "
            "another model watched"
        )
        raise DataError(msg)
    return rows, columns


def _tile_of(regions: Sequence[Mapping[str, Any]], view: View, area: Box) -> int:
    """The tile with the centre of the strongest region."""
    rows, columns = view.tiles
    if view.count == 1:
        return 0
    if not regions:
        msg = "it was cut into tiles and marks no region, so nothing says which tile it is about"
        raise DataError(msg)
    strongest = regions[0]
    x = strongest["x"] + strongest["width"] / 2 - area.x
    y = strongest["y"] + strongest["height"] / 2 - area.y
    row = min(max(int(y * rows / area.height), 0), rows - 1)
    column = min(max(int(x * columns / area.width), 0), columns - 1)
    return row * columns + column
