"""Events as the JSON objects that every sink writes, and capture times as dates."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from meliad_edge.events import Event

ToWallTime = Callable[[float], datetime]


def to_wall_time(
    captured_s: float, *, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
) -> datetime:
    """Date and time, UTC, of a moment on the monotonic clock."""
    return datetime.fromtimestamp(wall() - (monotonic() - captured_s), tz=timezone.utc)


def event_record(event: Event, to_wall_time: ToWallTime = to_wall_time) -> dict[str, Any]:
    """One state change of an event as JSON values; times are ISO 8601 in UTC, scores raw, regions in pixels."""
    return {
        "type": "event",
        "event": event.id,
        "state": event.state.value,
        "source": event.source,
        "started": to_wall_time(event.started_s).isoformat(timespec="milliseconds"),
        "last_seen": to_wall_time(event.last_seen_s).isoformat(timespec="milliseconds"),
        "first_frame": event.first_frame,
        "last_frame": event.last_frame,
        "peak_frame": event.frame.id,
        "score": event.peak_score,
        "threshold": event.prediction.threshold,
        "regions": [region.to_dict() for region in event.regions],
    }
