"""Events as the JSON objects that every sink writes."""

from __future__ import annotations

from typing import Any

from meliad_edge.events import Event


def event_record(event: Event) -> dict[str, Any]:
    """One state change of an event as JSON values.

    Times are ISO 8601 in UTC, and seconds since 1970 under names that end in ``_s``; scores are raw, regions in pixels.
    ``area`` is the part of the frame that was judged as x, y, width and height, None for all of it; ``grid`` the rows
    and columns of its map, which tell into how many tiles it was cut.
    """
    prediction = event.prediction
    return {
        "type": "event",
        "event": event.id,
        "kind": event.kind.value,
        "state": event.state.value,
        "camera": event.camera,
        "source": event.source,
        "started": event.started.date.isoformat(timespec="milliseconds"),
        "last_seen": event.last_seen.date.isoformat(timespec="milliseconds"),
        "started_s": round(event.started.wall_s, 3),
        "last_seen_s": round(event.last_seen.wall_s, 3),
        "duration_s": round(event.last_seen.monotonic_s - event.started.monotonic_s, 3),
        "first_frame": event.first_frame,
        "last_frame": event.last_frame,
        "peak_frame": None if event.frame is None else event.frame.id,
        "score": event.peak_score,
        "threshold": None if prediction is None else prediction.threshold,
        "area": None if prediction is None or prediction.area is None else list(prediction.area),
        "grid": None if prediction is None else list(prediction.map.shape),
        "regions": [region.to_dict() for region in event.regions],
        "condition": event.condition,
        "detail": event.detail,
    }
