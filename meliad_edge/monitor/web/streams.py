"""Responses without an end: a limited number of them, which end when the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import HTTPException
from fastapi.responses import StreamingResponse


class Streams:
    """Counts the responses of one kind that are being sent; everything happens in the thread of the server.

    Args:
        limit: Most of them at once.
        what: What they are called when there is none left.
    """

    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self._open = 0
        self._closing = asyncio.Event()

    def response(self, parts: AsyncIterator[bytes], media_type: str) -> StreamingResponse:
        """Send parts as they come; a client that is slow to take one holds up nobody but itself.

        Raises:
            HTTPException: 503, there are too many already.
        """
        if self._open >= self._limit:
            msg = f"{self._limit} {self._what} are open already; close one"
            raise HTTPException(503, msg, {"Retry-After": "10"})
        return StreamingResponse(self._count(parts), media_type=media_type)

    async def pause(self, seconds: float) -> bool:
        """Wait between two parts; False when the server stops and there must be no further part."""
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except asyncio.TimeoutError:
            return True
        return False

    def close(self) -> None:
        """Let every response end."""
        self._closing.set()

    async def _count(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self._open += 1
        try:
            async for part in parts:
                yield part
        finally:
            self._open -= 1
