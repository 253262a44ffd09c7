"""Events, their pictures, and what people say of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from fastapi import APIRouter, HTTPException, Query, Request, Response

from meliad_edge.event_store import EventStore, StoredEvent, Verdict
from meliad_edge.monitor.web.models import Event, Events, Judgement
from meliad_edge.monitor.web.numbers import finite
from meliad_edge.monitor.web.problems import describe_problems

_PICTURE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}\.(?:jpg|png)")
_MEDIA_TYPES = {".jpg": "image/jpeg", ".png": "image/png"}
_LONGEST_PAGE = 200


def event_routes(store: EventStore | None) -> APIRouter:
    """Everything under ``/events``.

    Args:
        store: None when the watch keeps no events; then every answer is 404 and says so.
    """
    router = APIRouter(prefix="/events", tags=["events"], responses=describe_problems(404))

    def opened() -> EventStore:
        if store is None:
            raise HTTPException(404, "this watch keeps no events; start it with --out FOLDER")
        return store

    def find(event_id: str) -> StoredEvent:
        opened().event_folder(event_id)  # refuses what is not an id
        stored = opened().event(event_id)
        if stored is None:
            raise HTTPException(404, f"there is no event {event_id}")
        return stored

    @router.get("")
    def list_events(
        limit: Annotated[int, Query(ge=1, le=_LONGEST_PAGE)] = 50,
        before: Annotated[str | None, Query(max_length=64, description="Only what began before this event.")] = None,
        camera: Annotated[str | None, Query(max_length=2000, description="Only of the camera of this name.")] = None,
        kind: Literal["anomaly", "camera", "drift"] | None = None,
        verdict: Annotated[
            Literal["confirmed", "rejected", "none"] | None, Query(description="`none`: those that nobody judged.")
        ] = None,
    ) -> Events:
        """Events, newest first."""
        found: list[StoredEvent] = []
        # Those that nobody judged are picked out here, from pages that are worth the trouble.
        size = _LONGEST_PAGE if verdict == "none" else limit + 1
        for stored in _newest_first(opened(), size, before, camera, kind, verdict):
            found.append(stored)
            if len(found) > limit:
                break
        page = found[:limit]
        return Events(
            events=[event_as_it_stands(stored) for stored in page], next=page[-1].id if len(found) > limit else None
        )

    @router.get("/{event_id}")
    def show_event(event_id: str) -> Event:
        """One event."""
        return event_as_it_stands(find(event_id))

    @router.get("/{event_id}/files/{name}", response_class=Response)
    def show_picture(request: Request, event_id: str, name: str) -> Response:
        """A picture of an event: what was decided, the frame as it was scored, or a frame around it."""
        file = find(event_id).folder / name
        missing = HTTPException(404, f"event {event_id} has no such picture")
        if not _PICTURE.fullmatch(name):
            raise missing
        try:
            status = file.stat()
            # A picture is replaced when the event reaches a higher score: it is kept, but asked about every time.
            headers = {"ETag": f'"{status.st_mtime_ns:x}-{status.st_size:x}"', "Cache-Control": "private, no-cache"}
            if request.headers.get("if-none-match") == headers["ETag"]:
                return Response(status_code=304, headers=headers)
            content = file.read_bytes()
        except FileNotFoundError:  # Or pruned meanwhile.
            raise missing from None
        return Response(content, media_type=_MEDIA_TYPES[file.suffix], headers=headers)

    @router.put("/{event_id}/verdict", responses=describe_problems(422))
    def judge_event(event_id: str, judgement: Judgement) -> Event:
        """Confirm or reject an event, or take the verdict back."""
        find(event_id)
        verdict = None if judgement.verdict is None else Verdict(judgement.verdict)
        return event_as_it_stands(opened().judge(event_id, verdict))

    return router


def event_as_it_stands(stored: StoredEvent) -> Event:
    """A stored event, with the names of its pictures."""
    record = stored.record
    return Event(
        id=stored.id,
        kind=stored.kind,
        camera=stored.camera,
        source=record.get("source", stored.camera),
        state=stored.state,
        started_s=stored.started_s,
        last_seen_s=stored.last_seen_s,
        score=finite(stored.score),
        threshold=finite(record.get("threshold")),
        condition=record.get("condition", ""),
        detail=record.get("detail", ""),
        regions=record.get("regions", []),
        verdict=None if stored.verdict is None else stored.verdict.value,
        judged_s=stored.judged_s,
        files=_list_pictures(stored),
    )


def _newest_first(
    store: EventStore, size: int, before: str | None, camera: str | None, kind: str | None, verdict: str | None
) -> Iterator[StoredEvent]:
    """Events, read from the store in pages of a size."""
    wanted = Verdict(verdict) if verdict in ("confirmed", "rejected") else None
    while True:
        page = store.events(limit=size, before=before, camera=camera, kind=kind, verdict=wanted)
        yield from (stored for stored in page if verdict != "none" or stored.verdict is None)
        if len(page) < size:
            return
        before = page[-1].id


def _list_pictures(stored: StoredEvent) -> list[str]:
    try:
        return sorted(file.name for file in stored.folder.iterdir() if _PICTURE.fullmatch(file.name))
    except FileNotFoundError:  # There are none, or they were pruned meanwhile.
        return []
