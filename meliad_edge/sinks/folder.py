"""Events in a folder: ``events.jsonl`` with one object per state change, and one picture per event."""

from __future__ import annotations

import re
from pathlib import Path

from meliad_edge import strict_json
from meliad_edge.errors import UsageError
from meliad_edge.events import Event, EventState
from meliad_edge.explain import describe_score, encode_picture, overlay
from meliad_edge.sinks.record import ToWallTime, event_record, to_wall_time


class FolderSink:
    """Appends to ``events.jsonl`` and keeps a picture of each event's highest score, with the evidence drawn over it.

    The picture is written when the event begins and again, if a higher score came, when it ends.

    Args:
        folder: Created when missing; what is in it stays.
        value_range: Colour scale of the pictures, ``Calibration.colour_range``.
        to_wall_time: Turns capture times into dates.

    Raises:
        UsageError: The folder cannot be created or written.
    """

    def __init__(
        self, folder: Path, value_range: tuple[float, float], *, to_wall_time: ToWallTime = to_wall_time
    ) -> None:
        self._folder = folder
        self._value_range = value_range
        self._to_wall_time = to_wall_time
        self._pictures: dict[int, tuple[str, int]] = {}  # Open events: file name, and the frame it shows.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._log = (folder / "events.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            msg = f"--out {folder}: cannot be written ({error.strerror}); give a folder that can"
            raise UsageError(msg) from error

    @property
    def name(self) -> str:
        """The folder."""
        return str(self._folder)

    def publish(self, event: Event) -> None:
        """Write the picture if it is due, then the object that names it."""
        name, shown_frame = self._pictures.get(event.id, (self._picture_name(event), -1))
        if event.state is not EventState.UPDATE and event.frame.id != shown_frame:
            caption = describe_score(event.prediction)
            picture = overlay(
                event.frame.image, event.prediction.map, self._value_range, event.regions, caption=caption
            )
            (self._folder / name).write_bytes(encode_picture(picture, ".jpg"))
            shown_frame = event.frame.id
        if event.state is EventState.END:
            self._pictures.pop(event.id, None)
        else:
            self._pictures[event.id] = (name, shown_frame)
        record = {**event_record(event, self._to_wall_time), "picture": name}
        self._log.write(strict_json.dumps(record) + "\n")
        self._log.flush()

    def close(self) -> None:
        """Close the log."""
        self._log.close()

    def _picture_name(self, event: Event) -> str:
        source = re.sub(r"[^A-Za-z0-9.-]+", "_", event.source)[-80:]
        return f"{self._to_wall_time(event.started_s):%Y%m%dT%H%M%SZ}_{source}_{event.id:04d}.jpg"
