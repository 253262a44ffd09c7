"""Events as lines of text on a stream: one line per event, when it begins."""

from __future__ import annotations

from collections.abc import Callable

from meliad_edge import strict_json
from meliad_edge.events import Event, EventState
from meliad_edge.explain import describe_score
from meliad_edge.sinks.record import event_record


class LineSink:
    """Announces every event once.

    Args:
        write_line: Takes a line without its end.
        describe: Makes the line.
    """

    name = "standard output"

    def __init__(self, write_line: Callable[[str], None], describe: Callable[[Event], str]) -> None:
        self._write_line = write_line
        self._describe = describe

    def publish(self, event: Event) -> None:
        """Write the line of a new event; updates and ends are not announced."""
        if event.state is EventState.NEW:
            self._write_line(self._describe(event))

    def close(self) -> None:
        """Nothing to do: the stream is not ours."""


def describe_for_people(event: Event) -> str:
    """Local time and source; of an anomaly score, strongest region and the labelled defect it looks like."""
    parts = [f"{event.started.date.astimezone():%H:%M:%S}", event.kind.value.upper(), event.source]
    if event.prediction is None:
        return "  ".join([*parts, event.detail])
    parts.append(describe_score(event.prediction))
    if event.regions:
        region = event.regions[0]
        parts.append(f"region {region.x},{region.y} {region.width}x{region.height}")
        if len(event.regions) > 1:
            parts[-1] += f" (+{len(event.regions) - 1})"
        if region.resembles is not None:
            parts.append(f"like '{region.resembles.defect}' ({region.resembles.source})")
    return "  ".join(parts)


def describe_as_json(event: Event) -> str:
    """The event's record as one line of JSON."""
    return strict_json.dumps(event_record(event))
