"""The application behind the page: who is let in, what is asked for, and what never ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse

import meliad_edge
from meliad_edge.device_threshold import LiveThreshold
from meliad_edge.event_store import EventStore
from meliad_edge.monitor.board import Board
from meliad_edge.monitor.liveness import Liveness
from meliad_edge.monitor.metrics import Metrics
from meliad_edge.monitor.model_info import ModelInfo
from meliad_edge.monitor.web.access import Access
from meliad_edge.monitor.web.cameras import camera_routes
from meliad_edge.monitor.web.events import event_routes
from meliad_edge.monitor.web.guard import Guard
from meliad_edge.monitor.web.health import health_routes
from meliad_edge.monitor.web.live import LivePictures
from meliad_edge.monitor.web.models import About, Latency, Model, StageLatency
from meliad_edge.monitor.web.pages import page_routes
from meliad_edge.monitor.web.problems import add_problem_handlers, describe_problems
from meliad_edge.monitor.web.streams import Streams
from meliad_edge.monitor.web.thresholds import threshold_routes
from meliad_edge.monitor.web.updates import Updates

_MOST_VIEWERS = 16
_MOST_LISTENERS = 32


def create_app(
    board: Board,
    threshold: LiveThreshold,
    model: ModelInfo,
    metrics: Metrics,
    *,
    store: EventStore | None = None,
    access: Access | None = None,
    liveness: Liveness | None = None,
) -> FastAPI:
    """Make the application of a watch, to be served by :class:`~meliad_edge.monitor.web.server.WebServer`.

    Args:
        board: Cameras and scores.
        threshold: In force, and to be moved.
        model: What decides.
        metrics: What ``/metrics`` gives.
        store: Where the watch keeps its events; None when it keeps none.
        access: Who is let in; None lets in everybody on this machine.
        liveness: What ``/healthz`` asks.
    """
    access = access or Access(None)
    pictures = LivePictures(board, threshold)
    viewers, listeners = Streams(_MOST_VIEWERS, "live pictures"), Streams(_MOST_LISTENERS, "pages")
    updates = Updates(board, threshold, store)

    @asynccontextmanager
    async def close_at_the_end(app: FastAPI) -> AsyncIterator[None]:
        yield
        pictures.close()

    app = FastAPI(
        title="meliad-edge watch",
        version=meliad_edge.__version__,
        summary="Cameras, scores, events and the threshold of a running watch.",
        docs_url=None,  # These pages load scripts from elsewhere.
        redoc_url=None,
        redirect_slashes=False,
        lifespan=close_at_the_end,
    )
    app.state.access = access
    app.state.streams = (viewers, listeners)
    add_problem_handlers(app)
    api = APIRouter(prefix="/api/v1", responses=describe_problems(401, 403))

    @api.get("/about", tags=["watch"])
    def show_about() -> About:
        """What runs."""
        return About(
            version=meliad_edge.__version__,
            model=Model(**asdict(model)),
            keeps_events=store is not None,
            needs_token=access.needs_token,
        )

    @api.get("/latency", tags=["watch"])
    def show_latency() -> Latency:
        """Latency by stage, of all cameras together."""
        if board.watcher is None:
            return Latency(stages={}, throughput_fps=0.0)
        summary = board.watcher.summary()
        stages = {name: StageLatency.model_validate(stage.to_dict()) for name, stage in summary.latencies.items()}
        return Latency(stages=stages, throughput_fps=summary.throughput_fps)

    @api.get("/updates", tags=["watch"], response_class=StreamingResponse, responses=describe_problems(503))
    async def tell_updates() -> StreamingResponse:
        """Server-sent events: what has changed, at most twice a second."""
        return listeners.response(updates.messages(listeners), "text/event-stream")

    @app.get("/metrics", tags=["watch"], response_class=Response)
    def show_metrics(request: Request) -> Response:
        """Metrics for Prometheus."""
        content, media_type = metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": media_type})

    api.include_router(camera_routes(board, pictures, viewers))
    api.include_router(event_routes(store))
    api.include_router(threshold_routes(threshold))
    app.include_router(api)
    app.include_router(health_routes(board, liveness or Liveness(board)))
    app.include_router(page_routes(access))
    app.add_middleware(Guard, access=access)
    return app
