"""Live pictures: encoded in one thread of their own, once for all who look, and only while somebody does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.device_threshold import LiveThreshold
from meliad_edge.explain import overlay
from meliad_edge.monitor.board import Board
from meliad_edge.monitor.web.streams import Streams
from meliad_edge.runtime.predictor import Region
from meliad_edge.runtime.view import Box
from meliad_edge.stream.watcher import Decision

BOUNDARY = "frame"
_LARGEST_WIDTH = 960
_QUALITY = 75
_SHORTEST_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class LivePicture:
    """An encoded frame.

    Attributes:
        frame: Id of the frame.
        captured_wall_s: When it was captured, seconds since 1970.
        jpeg: The picture.
    """

    frame: int
    captured_wall_s: float
    jpeg: bytes


@dataclass(frozen=True, slots=True)
class _Kept:
    """The picture of a camera that is shown at present, or is being made."""

    decision: Decision
    begun_s: float
    picture: asyncio.Future[LivePicture]


class LivePictures:
    """The newest picture of each camera, at most ten a second; all methods are for the thread of the server.

    Args:
        board: Where the frames are.
        threshold: Gives the colour scale.
        clock: Monotonic seconds.
    """

    def __init__(self, board: Board, threshold: LiveThreshold, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._board = board
        self._threshold = threshold
        self._clock = clock
        # One thread: however many look, the watch never shares the machine with more than one encoder.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode live pictures")
        self._kept: dict[tuple[str, bool], _Kept] = {}

    async def newest(self, camera: str, *, with_overlay: bool) -> LivePicture | None:
        """The newest picture of a camera, or None before its first frame.

        Raises:
            KeyError: There is no such camera.
        """
        decision = self._board.latest(camera)
        if decision is None:
            return None
        key = (camera, with_overlay)
        kept = self._kept.get(key)
        now_s = self._clock()
        if kept is None or (kept.decision is not decision and now_s - kept.begun_s >= _SHORTEST_INTERVAL_S):
            loop = asyncio.get_running_loop()
            colour_range = self._threshold.calibration.colour_range if with_overlay else None
            future = loop.run_in_executor(self._encoder, _encode, decision, colour_range)
            kept = self._kept[key] = _Kept(decision, now_s, future)
        # Shielded: one who leaves does not take the picture from the others.
        return await asyncio.shield(kept.picture)

    async def multipart(self, camera: str, streams: Streams, *, with_overlay: bool) -> AsyncIterator[bytes]:
        """The parts of a ``multipart/x-mixed-replace`` response; whoever is slow gets fewer pictures, none is queued.

        Args:
            camera: Its name.
            streams: Ends it.
            with_overlay: Draw evidence and regions.
        """
        shown = None
        is_open = True
        while is_open:
            picture = await self.newest(camera, with_overlay=with_overlay)
            if picture is not None and picture is not shown:
                shown = picture
                head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture.jpeg)}\r\n\r\n"
                yield head.encode() + picture.jpeg + b"\r\n"
            is_open = await streams.pause(_SHORTEST_INTERVAL_S)

    def close(self) -> None:
        """Stop encoding."""
        self._encoder.shutdown(wait=False, cancel_futures=True)


def _encode(decision: Decision, colour_range: tuple[float, float] | None) -> LivePicture:
    frame, prediction = decision.frame, decision.prediction
    image = frame.image
    scale = min(1.0, _LARGEST_WIDTH / image.shape[1])
    if scale < 1.0:
        image = np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
    if colour_range is not None:
        regions = [_scale_region(region, scale) for region in prediction.regions]
        area = None if prediction.area is None else _scale_box(prediction.area, scale, image)
        image = overlay(image, prediction.map, colour_range, regions, area=area)
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, _QUALITY))
    return LivePicture(frame.id, frame.captured_wall_s, data.tobytes())


def _scale_region(region: Region, scale: float) -> Region:
    return replace(
        region,
        x=round(scale * region.x),
        y=round(scale * region.y),
        width=max(1, round(scale * region.width)),
        height=max(1, round(scale * region.height)),
    )


def _scale_box(box: Box, scale: float, image: NDArray[np.uint8]) -> Box:
    """Scaled, and inside the image whatever was rounded."""
    height, width = image.shape[:2]
    x, y = min(round(scale * box.x), width - 1), min(round(scale * box.y), height - 1)
    return Box(
        x, y, min(max(1, round(scale * box.width)), width - x), min(max(1, round(scale * box.height)), height - y)
    )
