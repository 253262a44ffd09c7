"""Which events leave a store, and when; within the transaction of :class:`~meliad_edge.event_store.EventStore`."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

# The beginning of 2020. A device without a clock of its own starts in 1970: the age of such events is not known.
_CLOCK_WAS_SET_S = 1_577_836_800.0
# A clock that jumps, or that has just started, may be wrong by years; one that has not for so long is believed.
_CLOCK_TRIAL_S = 3600.0
# Nobody keeps events to the minute.
_CLOCK_JUMP_S = 600.0
# Beyond it judged events leave before others do, else no new event would be there long enough to be looked at.
_JUDGED_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class Retention:
    """How much is kept; judged events leave last, because the next fit needs them, up to three quarters of the space.

    Attributes:
        max_bytes: Of all pictures together.
        max_age_s: Of events that nobody judged.
        max_changes: State changes kept for destinations that cannot be reached; a day of one change a second. The
            latest change of every event that is kept comes on top.
    """

    max_bytes: int = 10 * 2**30
    max_age_s: float = 30 * 86_400.0
    max_changes: int = 86_400


class TriedClock:
    """Seconds since 1970, and whether they can be believed.

    Args:
        clock: Seconds since 1970.
        monotonic_clock: Seconds that nobody sets.
    """

    def __init__(self, clock: Callable[[], float], monotonic_clock: Callable[[], float]) -> None:
        self._clock = clock
        self._monotonic_clock = monotonic_clock
        self._set_s = monotonic_clock()  # As far as it is known; an unset clock may be corrected at any time.
        self._offset_s = clock() - self._set_s

    def __call__(self) -> float:
        """Seconds since 1970."""
        return self._clock()

    def is_steady(self) -> bool:
        """Whether it has gone on without a jump for long enough to be believed."""
        monotonic_s = self._monotonic_clock()
        offset_s = self._clock() - monotonic_s
        if abs(offset_s - self._offset_s) > _CLOCK_JUMP_S:
            self._offset_s, self._set_s = offset_s, monotonic_s
        return monotonic_s - self._set_s >= _CLOCK_TRIAL_S


def remove_old(database: sqlite3.Connection, before_s: float) -> list[str]:
    """Remove ended events that nobody judged and that were last seen before a time; returns their names."""
    old = database.execute(
        "SELECT id FROM events WHERE verdict IS NULL AND state = 'end' AND last_seen BETWEEN ? AND ?",
        (_CLOCK_WAS_SET_S, before_s),
    ).fetchall()
    database.executemany("DELETE FROM events WHERE id = ?", old)
    return [event_id for (event_id,) in old]


def remove_beyond(database: sqlite3.Connection, most_bytes: int) -> tuple[list[str], int]:
    """Remove ended events until the rest fits; returns their names, and how many of them were judged."""
    (kept,) = database.execute("SELECT COALESCE(SUM(bytes), 0) FROM events").fetchone()
    if kept <= most_bytes:
        return [], 0
    # As they ended, not as a clock said: that of a device without one starts in 1970 again and again.
    oldest_first = database.execute(
        "SELECT id, bytes, verdict IS NOT NULL FROM events WHERE state = 'end' "
        "ORDER BY (SELECT MAX(sequence) FROM changes WHERE event = id), events.rowid"
    ).fetchall()
    unjudged = [event for event in oldest_first if not event[2]]
    judged = [event for event in oldest_first if event[2]]
    newest_take = accumulate(size for _, size, _ in reversed(judged))
    beyond_share = len(judged) - sum(size <= _JUDGED_SHARE * most_bytes for size in newest_take)
    removed, removed_judged = [], 0
    for event_id, size, is_judged in (*judged[:beyond_share], *unjudged, *judged[beyond_share:]):
        if kept <= most_bytes:
            break
        removed.append(event_id)
        removed_judged += is_judged
        kept -= size
    database.executemany("DELETE FROM events WHERE id = ?", [(event_id,) for event_id in removed])
    return removed, removed_judged


def remove_changes(database: sqlite3.Connection, most: int) -> None:
    """Remove the oldest changes beyond so many; of an event that is kept the latest stays, which tells its end."""
    (newest,) = database.execute("SELECT COALESCE(MAX(sequence), 0) FROM changes").fetchone()
    oldest = {"oldest": newest - most}
    is_surplus = (
        "sequence <= :oldest AND (NOT EXISTS (SELECT 1 FROM events WHERE id = changes.event) OR EXISTS "
        "(SELECT 1 FROM changes AS later WHERE later.event = changes.event AND later.sequence > changes.sequence))"
    )
    database.execute(
        "UPDATE deliveries SET lost = lost + "
        f"(SELECT COUNT(*) FROM changes WHERE sequence > deliveries.sequence AND {is_surplus})",
        oldest,
    )
    database.execute(f"DELETE FROM changes WHERE {is_surplus}", oldest)
