"""A few seconds of small pictures around every anomaly, so that a person sees how it came and went."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import cv2
import numpy as np

from meliad_edge.event_store import EventStore
from meliad_edge.events import Event, EventKind, EventState
from meliad_edge.sinks.sink import UnavailableError
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.watcher import Decision

_BEFORE_S = _AFTER_S = 3.0
_INTERVAL_S = 0.25
_WIDTH, _QUALITY = 480, 80
# An event that lasts keeps its beginning, its end, and ever fewer pictures of the time between.
_MOST_PICTURES, _KEPT_PICTURES = 96, 24


@dataclass(frozen=True, slots=True)
class Clip:
    """The pictures around one event.

    Attributes:
        event: Its id.
        pictures: JPEG files, oldest first.
    """

    event: str
    pictures: tuple[bytes, ...] = field(repr=False)


@dataclass(slots=True)
class _Recording:
    pictures: list[tuple[float, bytes]]
    until_s: float | None = None


class ClipRecorder:
    """Collects clips in the frame loop, four pictures a second: half a millisecond each, some 30 kB of memory.

    Args:
        cameras: Names of those that show one scene; pictures of a folder have nothing before and after.
        publish: Takes a finished clip; must not wait.
    """

    def __init__(self, cameras: Collection[str], publish: Callable[[Clip], None]) -> None:
        self._publish = publish
        kept = round(_BEFORE_S / _INTERVAL_S) + 1
        self._recent: dict[str, deque[tuple[float, bytes]]] = {camera: deque(maxlen=kept) for camera in cameras}
        self._recordings: dict[tuple[str, str], _Recording] = {}

    def record_decision(self, decision: Decision) -> None:
        """Take in a frame."""
        recent = self._recent.get(decision.camera)
        captured_s = decision.frame.captured_s
        if recent is None or (recent and captured_s - recent[-1][0] < _INTERVAL_S):
            return
        picture = captured_s, _small_picture(decision.frame)
        recent.append(picture)
        for (camera, event_id), recording in list(self._recordings.items()):
            if camera != decision.camera:
                continue
            if recording.until_s is not None and captured_s > recording.until_s:
                self._finish(camera, event_id)
                continue
            recording.pictures.append(picture)
            if len(recording.pictures) > _MOST_PICTURES:
                del recording.pictures[_KEPT_PICTURES:-_KEPT_PICTURES:2]

    def record_event(self, event: Event) -> None:
        """Take in a state change."""
        if event.kind is not EventKind.ANOMALY or event.camera not in self._recent:
            return
        key = event.camera, event.id
        if event.state is EventState.NEW:
            since_s = event.started.monotonic_s - _BEFORE_S
            self._recordings[key] = _Recording([p for p in self._recent[event.camera] if p[0] >= since_s])
        elif event.state is EventState.END and key in self._recordings:
            self._recordings[key].until_s = event.last_seen.monotonic_s + _AFTER_S

    def finish(self) -> None:
        """The watch ends: hand over what was collected."""
        for camera, event_id in list(self._recordings):
            self._finish(camera, event_id)

    def _finish(self, camera: str, event_id: str) -> None:
        recording = self._recordings.pop((camera, event_id))
        self._publish(Clip(event_id, tuple(picture for _, picture in recording.pictures)))


class ClipSink:
    """Puts clips into the folders of their events: ``clip-000.jpg`` and so on."""

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self.name = f"clips in {store.folder}"

    def publish(self, clip: Clip) -> None:
        """Keep one clip.

        Raises:
            UnavailableError: It could not be written.
        """
        files = {f"clip-{n:03d}.jpg": data for n, data in enumerate(clip.pictures)}
        try:
            self._store.add_files(clip.event, files)
        except (OSError, sqlite3.Error) as error:
            msg = f"cannot write ({getattr(error, 'strerror', None) or error})"
            raise UnavailableError(msg) from error

    def close(self) -> None:
        """Close the connection of this thread."""
        self._store.close()


def _small_picture(frame: Frame) -> bytes:
    height, width = frame.image.shape[:2]
    small = frame.image
    if width > _WIDTH:
        small = np.asarray(cv2.resize(small, (_WIDTH, max(1, round(height * _WIDTH / width)))), dtype=np.uint8)
    _, data = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return data.tobytes()
