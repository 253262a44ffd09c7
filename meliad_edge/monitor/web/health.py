"""Whether the watch works, for whoever restarts it or waits for it; names no camera, for nobody has logged in."""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import BaseModel

from meliad_edge.monitor.board import Board
from meliad_edge.monitor.liveness import Liveness
from meliad_edge.stream.reader import ReaderState


class Health(BaseModel):
    """Whether the frame loop works."""

    alive: bool
    stalled_s: float


class Readiness(BaseModel):
    """Whether at least one camera delivers."""

    ready: bool
    cameras: int
    not_delivering: list[int]


def health_routes(board: Board, liveness: Liveness) -> APIRouter:
    """``/healthz`` and ``/readyz``: 200 for yes, 503 for no."""
    router = APIRouter(tags=["health"])

    @router.get("/healthz", responses={503: {"model": Health}})
    def is_alive(response: Response) -> Health:
        """Whether frames that wait are taken up; lost cameras are no reason to restart the watch."""
        health = Health(alive=liveness.is_alive, stalled_s=round(liveness.stalled_s(), 1))
        response.status_code = 200 if health.alive else 503
        return health

    @router.get("/readyz", responses={503: {"model": Readiness}})
    def is_ready(response: Response) -> Readiness:
        """Whether at least one camera delivers; those that do not are listed by number."""
        statuses = board.statuses(with_frames=False)
        silent = [
            number
            for number, status in enumerate(statuses)
            if status.state != ReaderState.STREAMING.value or status.condition == "lost"
        ]
        ready = Readiness(ready=len(silent) < len(statuses), cameras=len(statuses), not_delivering=silent)
        response.status_code = 200 if ready.ready else 503
        return ready

    return router
