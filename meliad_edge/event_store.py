"""What a watch has seen, kept on disk: events, their pictures, what people said of them, what is still to be delivered.

A folder with ``events.sqlite`` and one folder per event. SQLite's write-ahead log with full synchronisation, and
pictures that are on the disk before the event that they belong to: what was committed survives the process and the
power, and readers never wait for the writer.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from meliad_edge import strict_json
from meliad_edge.errors import DataError, UsageError
from meliad_edge.event_retention import Retention, TriedClock, remove_beyond, remove_changes, remove_old

_logger = logging.getLogger(__name__)

DATABASE = "events.sqlite"
LOCK = "watch.lock"
SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 10.0
_PARTIAL = ".partial"
# What ``events.new_event_id`` gives: nothing else in the folder is ever removed.
_EVENT_ID = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{6}")
_SCHEMA = """
CREATE TABLE events (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, camera TEXT NOT NULL, state TEXT NOT NULL,
    started REAL NOT NULL, last_seen REAL NOT NULL, score REAL, record TEXT NOT NULL,
    bytes INTEGER NOT NULL DEFAULT 0, verdict TEXT, judged REAL
) STRICT;
CREATE INDEX events_by_time ON events (started);
CREATE TABLE changes (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, event TEXT NOT NULL, record TEXT NOT NULL
) STRICT;
CREATE INDEX changes_by_event ON changes (event);
CREATE TABLE deliveries (
    destination TEXT PRIMARY KEY, sequence INTEGER NOT NULL, lost INTEGER NOT NULL DEFAULT 0
) STRICT;
"""
_EVENT_COLUMNS = "id, kind, camera, state, started, last_seen, score, record, verdict, judged"


class Verdict(Enum):
    """What a person said of an event."""

    CONFIRMED = "confirmed"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event as it stands.

    Attributes:
        id, kind, camera: As in :class:`~meliad_edge.events.Event`.
        state: Its latest state; an event that was open when the watch was killed is ``"end"`` too.
        started_s, last_seen_s: Seconds since 1970.
        score: Highest raw score, of an anomaly.
        record: Its latest record, as sinks write it.
        verdict: What a person said of it; None when nobody has.
        judged_s: When, seconds since 1970.
        folder: Where its pictures are; they may be missing.
    """

    id: str
    kind: str
    camera: str
    state: str
    started_s: float
    last_seen_s: float
    score: float | None
    record: dict[str, Any]
    verdict: Verdict | None
    judged_s: float | None
    folder: Path


@dataclass(frozen=True, slots=True)
class Change:
    """One state change, to be delivered.

    Attributes:
        sequence: Grows by at least one from change to change.
        event: Id of the event.
        before: The record of the change before, of the same event; None when there was none or it is not kept any more.
        record: As sinks write it.
        folder: Where the pictures of the event are; they may be missing.
    """

    sequence: int
    event: str
    before: dict[str, Any] | None
    record: dict[str, Any]
    folder: Path


class EventStore:
    """Safe to use from several threads, and from several processes.

    Args:
        folder: Created when missing.
        retention: How much :meth:`prune` leaves.
        clock: Seconds since 1970.
        monotonic_clock: Seconds that nobody sets.

    Raises:
        UsageError: The folder cannot be created or written, or holds a store of a later version.
    """

    def __init__(
        self,
        folder: Path,
        *,
        retention: Retention | None = None,
        clock: Callable[[], float] = time.time,
        monotonic_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self._retention = retention or Retention()
        self._clock = TriedClock(clock, monotonic_clock)
        self._connections = threading.local()
        self._has_changed = threading.Condition()
        self._revision = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._transaction() as database:
                _create_or_check(database, folder)
        except (OSError, sqlite3.Error) as error:
            self.close()
            msg = f"{folder}: cannot keep events ({error}); give a folder that can be written"
            raise UsageError(msg) from error
        except UsageError:
            self.close()
            raise

    def write(self, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Keep one state change with the pictures it brings; all of it or nothing.

        Args:
            record: As :func:`meliad_edge.sinks.record.event_record` gives it.
            files: Contents by file name, in the folder of the event; what was there is replaced.

        Raises:
            OSError, sqlite3.Error: It could not be written, for example because the disk is full.
        """
        event_id = str(record["event"])
        text = strict_json.dumps(dict(record))
        is_new = not self.event_folder(event_id).exists()
        try:
            # First, so that no event is ever without the pictures that it came with.
            self._write_files(event_id, files)
            self._write_record(event_id, record, text)
        except BaseException:
            if is_new:
                shutil.rmtree(self.event_folder(event_id), ignore_errors=True)
            raise
        self.wake()

    def add_files(self, event_id: str, files: Mapping[str, bytes]) -> None:
        """Put pictures into the folder of an event, each complete or not at all; none if the event was pruned.

        Raises:
            OSError, sqlite3.Error: They could not be written.
        """
        self._write_files(event_id, files)
        with self._transaction() as database:
            # One without changes has yet to be written: its sink waits for a disk that was full.
            (is_pruned,) = database.execute(
                "SELECT EXISTS (SELECT 1 FROM changes WHERE event = ?1) "
                "AND NOT EXISTS (SELECT 1 FROM events WHERE id = ?1)",
                (event_id,),
            ).fetchone()
            self._measure(database, event_id)
        if is_pruned:
            shutil.rmtree(self.event_folder(event_id), ignore_errors=True)

    def event_folder(self, event_id: str) -> Path:
        """Where the pictures of an event are.

        Raises:
            DataError: That is not the id of an event.
        """
        if not _EVENT_ID.fullmatch(event_id):
            msg = f"{event_id!r} is not the id of an event"
            raise DataError(msg)
        return self.folder / event_id

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Be the one process that writes events here, until the block is left or the process ends.

        Raises:
            UsageError: Another watch is.
        """
        with (self.folder / LOCK).open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                msg = f"{self.folder}: another watch keeps its events there; stop it, or give another folder"
                raise UsageError(msg) from None
            yield

    def end_interrupted(self) -> int:
        """End what was open when the last watch was killed, to be called before the first write; returns how many.

        Pictures whose event was never committed are removed.
        """
        with self._transaction() as database:
            rows = database.execute("SELECT id, record FROM events WHERE state != 'end'").fetchall()
            for event_id, text in rows:
                for partial in self.event_folder(event_id).glob(f".*{_PARTIAL}"):
                    partial.unlink(missing_ok=True)
                ended = strict_json.dumps({**json.loads(text), "state": "end"})
                database.execute("UPDATE events SET state = 'end', record = ? WHERE id = ?", (ended, event_id))
                self._measure(database, event_id)
                database.execute("INSERT INTO changes (event, record) VALUES (?, ?)", (event_id, ended))
            known = {event_id for (event_id,) in database.execute("SELECT id FROM events")}
        for folder in self.folder.iterdir():
            if _EVENT_ID.fullmatch(folder.name) and folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
        self.wake()
        return len(rows)

    def events(
        self,
        *,
        limit: int = 50,
        before: str | None = None,
        camera: str | None = None,
        kind: str | None = None,
        verdict: Verdict | None = None,
    ) -> list[StoredEvent]:
        """Events, newest first.

        Args:
            limit: Most events returned.
            before: Id of an event: only those that began before it.
            camera: Only of this one.
            kind: Only of this kind.
            verdict: Only with this verdict.
        """
        conditions: list[str] = []
        values: list[object] = []
        for column, value in (
            ("camera", camera),
            ("kind", kind),
            ("verdict", verdict.value if verdict is not None else None),
        ):
            if value is not None:
                conditions.append(f"{column} = ?")
                values.append(value)
        if before is not None:
            conditions.append("(started, id) < (SELECT started, id FROM events WHERE id = ?)")
            values.append(before)
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        rows = self._database().execute(
            f"SELECT {_EVENT_COLUMNS} FROM events {where} ORDER BY started DESC, id DESC LIMIT ?", (*values, limit)
        )
        return [self._stored(row) for row in rows]

    def event(self, event_id: str) -> StoredEvent | None:
        """One event, or None when there is none of that id."""
        row = self._database().execute(f"SELECT {_EVENT_COLUMNS} FROM events WHERE id = ?", (event_id,)).fetchone()
        return None if row is None else self._stored(row)

    def judge(self, event_id: str, verdict: Verdict | None) -> StoredEvent:
        """Keep what a person says of an event; None takes it back.

        Raises:
            DataError: There is no such event.
        """
        judged = None if verdict is None else self._clock()
        with self._transaction() as database:
            database.execute(
                "UPDATE events SET verdict = ?, judged = ? WHERE id = ?",
                (None if verdict is None else verdict.value, judged, event_id),
            )
        event = self.event(event_id)
        if event is None:
            msg = f"no event {event_id} in {self.folder}"
            raise DataError(msg)
        return event

    def undelivered(self, destination: str, *, limit: int = 100) -> list[Change]:
        """The oldest state changes that a destination has not taken.

        A destination that is asked for the first time gets what is written from then on. What was pruned before it
        could be delivered is counted in :meth:`lost`.
        """
        database = self._database()
        row = database.execute("SELECT sequence FROM deliveries WHERE destination = ?", (destination,)).fetchone()
        if row is None:
            with self._transaction():
                database.execute(
                    "INSERT INTO deliveries (destination, sequence) "
                    "VALUES (?, (SELECT COALESCE(MAX(seq), 0) FROM sqlite_sequence WHERE name = 'changes')) "
                    "ON CONFLICT DO NOTHING",
                    (destination,),
                )
            return []
        rows = database.execute(
            "SELECT sequence, event, record, "
            "(SELECT record FROM changes AS earlier WHERE earlier.event = changes.event "
            "AND earlier.sequence < changes.sequence ORDER BY earlier.sequence DESC LIMIT 1) "
            "FROM changes WHERE sequence > ? ORDER BY sequence LIMIT ?",
            (*row, limit),
        ).fetchall()
        return [
            Change(
                sequence=sequence,
                event=event_id,
                before=None if before is None else json.loads(before),
                record=json.loads(record),
                folder=self.folder / event_id,
            )
            for sequence, event_id, record, before in rows
        ]

    def set_delivered(self, destination: str, sequence: int) -> None:
        """A destination has taken, or refused for good, everything up to a change."""
        with self._transaction() as database:
            database.execute(
                "UPDATE deliveries SET sequence = MAX(sequence, ?) WHERE destination = ?", (sequence, destination)
            )

    def pending(self, destination: str) -> int:
        """State changes that a destination has yet to take."""
        (count,) = (
            self._database()
            .execute(
                "SELECT COUNT(*) FROM changes WHERE sequence > (SELECT sequence FROM deliveries WHERE destination = ?)",
                (destination,),
            )
            .fetchone()
        )
        return int(count)

    def lost(self, destination: str) -> int:
        """State changes that were pruned before a destination had taken them."""
        row = self._database().execute("SELECT lost FROM deliveries WHERE destination = ?", (destination,)).fetchone()
        return 0 if row is None else int(row[0])

    @property
    def revision(self) -> int:
        """Grows with every :meth:`write` and :meth:`wake` of this process."""
        return self._revision

    def wait(self, timeout_s: float, *, since: int | None = None) -> None:
        """Wait until something was written by this process, or the time is over.

        Args:
            timeout_s: Longest wait.
            since: A :attr:`revision` that was read before looking: what was written since ends the wait at once.
        """
        with self._has_changed:
            seen = self._revision if since is None else since
            self._has_changed.wait_for(lambda: self._revision != seen, timeout_s)

    def wake(self) -> None:
        """Let go of every :meth:`wait`."""
        with self._has_changed:
            self._revision += 1
            self._has_changed.notify_all()

    def prune(self) -> int:
        """Remove what is beyond the retention; returns how many events went.

        Age removes nothing while the clock may be wrong: in the first hour, and in the hour after it was set.
        """
        limits = self._retention
        with self._transaction() as database:
            old = remove_old(database, self._clock() - limits.max_age_s) if self._clock.is_steady() else []
            surplus, judged = remove_beyond(database, limits.max_bytes)
            remove_changes(database, limits.max_changes)
        if judged:
            _logger.warning(
                "%s: %d of the oldest judged events removed, they left no room for new ones; allow more with --keep-gb",
                self.folder,
                judged,
            )
        removed = [*old, *surplus]
        for event_id in removed:
            shutil.rmtree(self.folder / event_id, ignore_errors=True)
        return len(removed)

    def close(self) -> None:
        """Close the connection of the calling thread."""
        database = getattr(self._connections, "database", None)
        if database is not None:
            database.close()
            del self._connections.database

    def _write_files(self, event_id: str, files: Mapping[str, bytes]) -> None:
        if not files:
            return
        folder = self.event_folder(event_id)
        folder.mkdir(exist_ok=True)
        partials = {folder / f".{name}{_PARTIAL}": folder / name for name in files}
        try:
            for partial, content in zip(partials, files.values(), strict=True):
                with partial.open("wb") as opened:
                    opened.write(content)
                    opened.flush()
                    os.fsync(opened.fileno())
            # Once all are there, so that a full disk never leaves the new picture beside the old frame.
            for partial, file in partials.items():
                partial.replace(file)
        except OSError:
            for partial in partials:
                partial.unlink(missing_ok=True)
            raise
        _sync_folder(folder)
        _sync_folder(self.folder)

    def _write_record(self, event_id: str, record: Mapping[str, Any], text: str) -> None:
        with self._transaction() as database:
            database.execute(
                "INSERT INTO events (id, kind, camera, state, started, last_seen, score, record) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET state = excluded.state, "
                "last_seen = excluded.last_seen, score = excluded.score, record = excluded.record",
                (
                    event_id,
                    record["kind"],
                    record["camera"],
                    record["state"],
                    record["started_s"],
                    record["last_seen_s"],
                    _finite(record["score"]),
                    text,
                ),
            )
            self._measure(database, event_id)
            database.execute("INSERT INTO changes (event, record) VALUES (?, ?)", (event_id, text))

    def _measure(self, database: sqlite3.Connection, event_id: str) -> None:
        folder = self.event_folder(event_id)
        size = 0
        for file in folder.iterdir() if folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):  # Another thread has completed it.
                size += file.stat().st_size
        database.execute("UPDATE events SET bytes = ? WHERE id = ?", (size, event_id))

    def _stored(self, row: Sequence[Any]) -> StoredEvent:
        event_id, kind, camera, state, started, last_seen, score, record, verdict, judged = row
        return StoredEvent(
            id=event_id,
            kind=kind,
            camera=camera,
            state=state,
            started_s=started,
            last_seen_s=last_seen,
            score=score,
            record=json.loads(record),
            verdict=None if verdict is None else Verdict(verdict),
            judged_s=judged,
            folder=self.folder / event_id,
        )

    def _database(self) -> sqlite3.Connection:
        """The connection of this thread."""
        database: sqlite3.Connection | None = getattr(self._connections, "database", None)
        if database is None:
            database = sqlite3.connect(
                self.folder / DATABASE, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            try:
                _keep_log_ahead(database)
                database.execute("PRAGMA synchronous = FULL")
            except sqlite3.Error:
                database.close()
                raise
            self._connections.database = database
        return database

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        database = self._database()
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            # SQLite rolls back by itself where the disk is full.
            with contextlib.suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            raise


def _keep_log_ahead(database: sqlite3.Connection) -> None:
    """Switch to the write-ahead log; where another process is just doing that, SQLite by itself does not wait."""
    until_s = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until_s:
                raise
            time.sleep(0.01)


def _create_or_check(database: sqlite3.Connection, folder: Path) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == 0:
        for statement in _SCHEMA.split(";\n"):
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    elif version != SCHEMA_VERSION:
        msg = f"{folder}: holds events of version {version}, this version reads {SCHEMA_VERSION}; give another folder"
        raise UsageError(msg)


def _finite(score: Any) -> float | None:
    """A score that is not a finite number is null, in the database as in the record."""
    return float(score) if isinstance(score, (int, float)) and math.isfinite(score) else None


def _sync_folder(folder: Path) -> None:
    """Make what was created or renamed in a folder survive the power."""
    if os.name == "nt":  # Cannot open a folder.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
