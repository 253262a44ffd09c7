"""Cameras, their scores and their live pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import StreamingResponse

from meliad_edge.monitor.board import Board, CameraStatus, ScorePoint
from meliad_edge.monitor.web.live import BOUNDARY, LivePictures
from meliad_edge.monitor.web.models import Camera, Cameras, CameraState, Frames, Point, Scores
from meliad_edge.monitor.web.numbers import finite
from meliad_edge.monitor.web.problems import describe_problems
from meliad_edge.monitor.web.streams import Streams

WithOverlay = Annotated[bool, Query(alias="overlay", description="Draw the evidence and the regions.")]


def camera_routes(board: Board, pictures: LivePictures, streams: Streams) -> APIRouter:
    """Everything under ``/cameras``; a camera is named by its number, for its name may hold anything."""
    router = APIRouter(prefix="/cameras", tags=["cameras"], responses=describe_problems(404))

    def find(number: int) -> str:
        if not 0 <= number < len(board.cameras):
            msg = f"there is no camera {number}; there are {len(board.cameras)}, counted from 0"
            raise HTTPException(404, msg)
        return board.cameras[number]

    @router.get("")
    def list_cameras() -> Cameras:
        """Every camera as it stands."""
        return Cameras(cameras=[_camera(number, status) for number, status in enumerate(board.statuses())])

    @router.get("/{number}/scores")
    def list_scores(
        number: int,
        since_s: Annotated[float, Query(description="Only what was captured later, seconds since 1970.")] = 0.0,
        limit: Annotated[
            int, Query(ge=2, le=3600, description="Most points; of those that fall together, the highest.")
        ] = 600,
    ) -> Scores:
        """Score history, of the last hour at most: the highest score of each stretch of time."""
        return Scores(points=[_point(kept) for kept in thin(board.scores(find(number), since_s=since_s), limit)])

    @router.get("/{number}/snapshot.jpg", response_class=Response, responses=_jpeg("image/jpeg"))
    async def show(request: Request, number: int, overlay: WithOverlay = False) -> Response:
        """The newest picture, not wider than 960 pixels."""
        picture = await pictures.newest(find(number), with_overlay=overlay)
        if picture is None:
            raise HTTPException(404, "this camera has delivered no picture yet")
        headers = {"ETag": f'"{picture.frame}"', "Cache-Control": "no-store"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(picture.jpeg, media_type="image/jpeg", headers=headers)

    @router.get(
        "/{number}/live.mjpg",
        response_class=StreamingResponse,
        responses={**_jpeg("multipart/x-mixed-replace"), **describe_problems(503)},
    )
    async def show_live(number: int, overlay: WithOverlay = False) -> StreamingResponse:
        """The newest pictures, at most ten a second; a slow viewer gets fewer."""
        parts = pictures.multipart(find(number), streams, with_overlay=overlay)
        return streams.response(parts, f"multipart/x-mixed-replace; boundary={BOUNDARY}")

    return router


def camera_state(number: int, status: CameraStatus) -> CameraState:
    """A status without what takes counting."""
    return CameraState(**_state_fields(number, status))


def thin(points: Sequence[ScorePoint], most: int) -> list[ScorePoint]:
    """At most so many points, each the highest of its neighbours, so that no anomaly is lost."""
    size = -(-len(points) // most)  # rounded up
    if size <= 1:
        return list(points)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    # What is not a number counts as the highest, as it does in the decision.
    return [max(group, key=lambda point: (point.score != point.score, point.score)) for group in groups]


def _camera(number: int, status: CameraStatus) -> Camera:
    return Camera(
        **_state_fields(number, status),
        address=status.address,
        description=status.description,
        notice=status.notice,
        reconnects=status.reconnects,
        events=status.events,
        frames=Frames.model_validate(status.frames),
    )


def _state_fields(number: int, status: CameraStatus) -> dict[str, Any]:
    latest, latency = status.latest, status.capture_to_decision
    return {
        "number": number,
        "name": status.name,
        "state": status.state,
        "condition": status.condition,
        "condition_detail": status.condition_detail,
        "drift": status.drift,
        "drift_detail": status.drift_detail,
        "anomaly": status.anomaly,
        "fps": status.fps,
        "frame": None if latest is None else latest.frame.id,
        "captured_s": None if latest is None else latest.frame.captured_wall_s,
        "score": None if latest is None else finite(latest.prediction.score),
        "threshold": None if latest is None else finite(latest.prediction.threshold),
        "p50_ms": None if latency is None else 1e3 * latency.p50_s,
        "p99_ms": None if latency is None else 1e3 * latency.p99_s,
    }


def _point(kept: ScorePoint) -> Point:
    return Point(time_s=kept.time_s, score=finite(kept.score), threshold=finite(kept.threshold))


def _jpeg(media_type: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": "JPEG", "content": {media_type: {}}}}
