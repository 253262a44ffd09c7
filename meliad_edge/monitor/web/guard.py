"""What every request passes on its way in, and what every response carries on its way out."""

from __future__ import annotations

import logging

from fastapi import HTTPException
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meliad_edge.monitor.web.access import Access, is_from_another_site
from meliad_edge.monitor.web.problems import problem_response

_logger = logging.getLogger(__name__)

_LARGEST_BODY_BYTES = 16 * 1024
_TOO_LARGE = f"a body has at most {_LARGEST_BODY_BYTES} bytes"
# What somebody sees who has not logged in: nothing of the watch.
_PUBLIC = frozenset({"/login", "/healthz", "/readyz", "/static/login.js", "/static/page.css", "/static/icon.svg"})
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Refuses what is not asked for by somebody known, from this site, under a name of ours, in a small body.

    Args:
        app: What is guarded.
        access: Decides who is let in.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        has_begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refuse(HTTPConnection(scope), scope["method"])
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        try:
            await self._app(scope, _SmallBody(receive).receive, send_with_headers)
        except Exception:
            _logger.exception("%s %s failed", scope["method"], scope["path"])
            if not has_begun:
                failure = problem_response(500, "this is an error of meliad-edge; its log says more")
                await failure(scope, receive, send_with_headers)

    def _refuse(self, connection: HTTPConnection, method: str) -> Response | None:
        host = connection.headers.get("host", "")
        if not self._access.is_host_allowed(host):
            return problem_response(421, f"Host {host[:100]!r} is not a name of this machine; ask for 127.0.0.1")
        if is_from_another_site(connection, method):
            return problem_response(403, "this was asked for by another site")
        length = connection.headers.get("content-length", "0")
        if len(length) > 9 or not length.isdecimal() or int(length) > _LARGEST_BODY_BYTES:
            return problem_response(413, _TOO_LARGE)
        path = connection.scope["path"]
        if path in _PUBLIC:
            return None
        standing = self._access.standing(connection)
        if standing == "known":
            return None
        if standing == "refused":
            return problem_response(429, "too many wrong tokens; wait a minute", {"Retry-After": "60"})
        if path == "/":
            return RedirectResponse("/login", status_code=303)
        return problem_response(
            401, "log in, or give the token as a bearer", {"WWW-Authenticate": 'Bearer realm="meliad-edge"'}
        )


class _SmallBody:
    """Counts a body as it comes, for one that does not announce its length."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._received = 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > _LARGEST_BODY_BYTES:
            raise HTTPException(413, _TOO_LARGE)
        return message
