"""Events in a folder: the event store with their pictures, and ``events.jsonl`` with one object per state change."""

from __future__ import annotations

import logging
import sqlite3

from meliad_edge import strict_json
from meliad_edge.errors import UsageError
from meliad_edge.event_store import EventStore
from meliad_edge.events import Event, EventState
from meliad_edge.explain import describe_score, encode_picture, overlay
from meliad_edge.sinks.record import event_record
from meliad_edge.sinks.sink import UnavailableError

_logger = logging.getLogger(__name__)

LOG = "events.jsonl"
_LARGEST_LOG_BYTES = 16 * 2**20


class FolderSink:
    """Keeps events in the store, each with the picture of its highest score, and appends to ``events.jsonl``.

    Per event ``picture.jpg`` has the evidence drawn over it and ``frame.png`` is what was scored, for the next fit.
    They are written when the event begins and again, if a higher score came, when it ends. A log of 16 MiB becomes
    ``events.1.jsonl``, and the one before that is removed.

    Args:
        store: Where events are kept.
        value_range: Colour scale of the pictures, ``Calibration.colour_range``.

    Raises:
        UsageError: The folder cannot be written.
    """

    def __init__(self, store: EventStore, value_range: tuple[float, float]) -> None:
        self._store = store
        self._value_range = value_range
        self._shown: dict[str, int] = {}  # Open events: the frame their picture shows.
        self._path = store.folder / LOG
        try:
            self._log = self._path.open("a", encoding="utf-8")
        except OSError as error:
            msg = f"--out {store.folder}: cannot be written ({error.strerror}); give a folder that can"
            raise UsageError(msg) from error

    @property
    def name(self) -> str:
        """The folder."""
        return str(self._store.folder)

    def publish(self, event: Event) -> None:
        """Keep one state change, with the picture if it is due.

        Raises:
            UnavailableError: It could not be kept, for example because the disk is full; nothing of it was.
        """
        files = {}
        is_due = event.state is not EventState.UPDATE
        if event.frame is not None and is_due and self._shown.get(event.id) != event.frame.id:
            files = {"picture.jpg": self._picture(event), "frame.png": encode_picture(event.frame.image, ".png")}
        record = event_record(event)
        if event.frame is not None:
            record["picture"] = f"{event.id}/picture.jpg"
        try:
            self._store.write(record, files)
        except (OSError, sqlite3.Error) as error:
            msg = f"cannot write ({getattr(error, 'strerror', None) or error})"
            raise UnavailableError(msg) from error
        if event.state is EventState.END:
            self._shown.pop(event.id, None)
            self._prune()
        elif files and event.frame is not None:
            self._shown[event.id] = event.frame.id
        self._append(strict_json.dumps(record))

    def close(self) -> None:
        """Close the log and the store."""
        self._log.close()
        self._store.close()

    def _picture(self, event: Event) -> bytes:
        assert event.frame is not None
        image, prediction = event.frame.image, event.prediction
        if prediction is None:
            return encode_picture(image, ".jpg")
        drawn = overlay(
            image,
            prediction.map,
            self._value_range,
            event.regions,
            area=prediction.area,
            caption=describe_score(prediction),
        )
        return encode_picture(drawn, ".jpg")

    def _prune(self) -> None:
        try:
            self._store.prune()
        except (OSError, sqlite3.Error) as error:  # There will be a next time; the event is kept.
            _logger.warning("%s: cannot remove what is old (%s)", self.name, error)

    def _append(self, line: str) -> None:
        """Add a line to the log, which is a convenience: the event is safe in the store whether or not it succeeds."""
        try:
            self._log.write(line + "\n")
            self._log.flush()
        except OSError as error:
            _logger.warning("%s: cannot write (%s)", self._path, error.strerror)
            return
        if self._log.tell() > _LARGEST_LOG_BYTES:
            self._log.close()
            self._path.replace(self._path.with_suffix(".1.jsonl"))
            self._log = self._path.open("a", encoding="utf-8")
