"""The page itself, the way in and the way out."""

from __future__ import annotations

import hashlib
import importlib.resources
import logging

from fastapi import APIRouter, HTTPException, Request, Response

from meliad_edge.monitor.web.access import SESSION_S, Access, address_of, cookie_name
from meliad_edge.monitor.web.models import Token
from meliad_edge.monitor.web.problems import describe_problems

_logger = logging.getLogger(__name__)

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def page_routes(access: Access) -> APIRouter:
    """The page, its parts, and the session of somebody who has logged in."""
    router = APIRouter(include_in_schema=False)
    folder = importlib.resources.files("meliad_edge.monitor.web") / "static"
    # Read once, and never by a name that somebody sends.
    contents = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    def serve(request: Request, name: str) -> Response:
        content = contents.get(name)
        if content is None:
            raise HTTPException(404, "there is no such page")
        # Kept by the browser, but asked about every time: an update of the watch changes them.
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"', "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=_MEDIA_TYPES[f".{name.rpartition('.')[2]}"], headers=headers)

    @router.get("/")
    async def show_page(request: Request) -> Response:
        return serve(request, "index.html")

    @router.get("/login")
    async def show_login(request: Request) -> Response:
        return serve(request, "login.html")

    @router.get("/static/{name}")
    async def show_part(request: Request, name: str) -> Response:
        return serve(request, name)

    @router.post("/login", status_code=204, responses=describe_problems(401, 429))
    async def log_in(request: Request, given: Token) -> Response:
        if not access.needs_token:
            return Response(status_code=204)
        address = address_of(request)
        standing = access.check_token(address, given.token)
        if standing == "refused":
            raise HTTPException(429, "too many wrong tokens; wait a minute", {"Retry-After": "60"})
        if standing == "unknown":
            _logger.warning("a wrong token was given from %s", address)
            raise HTTPException(401, "this is not the token")
        response = Response(status_code=204)
        response.set_cookie(
            cookie_name(request),
            access.new_session(),
            max_age=SESSION_S,
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
        return response

    @router.post("/logout", status_code=204)
    async def log_out(request: Request) -> Response:
        response = Response(status_code=204)
        response.delete_cookie(cookie_name(request), httponly=True, samesite="strict")
        return response

    return router
