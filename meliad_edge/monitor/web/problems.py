"""Errors as RFC 9457 problem details: one shape for all of them, and never a stack trace."""

from __future__ import annotations

import http
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from meliad_edge.errors import DataError, UsageError


class Problem(BaseModel):
    """What went wrong with a request, ``application/problem+json``."""

    type: str = Field(default="about:blank", description="Always about:blank: the status says it all.")
    title: str = Field(description="The status in words.")
    status: int
    detail: str = Field(description="What failed, the value seen, what to do next; one line.")


def problem_response(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """A response that says what went wrong."""
    problem = Problem(title=http.HTTPStatus(status).phrase, status=status, detail=detail)
    return JSONResponse(
        problem.model_dump(), status_code=status, headers=headers, media_type="application/problem+json"
    )


def describe_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of the errors of a route."""
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {status: {"description": http.HTTPStatus(status).phrase, "content": content} for status in statuses}


def add_problem_handlers(app: FastAPI) -> None:
    """Let an application answer with a problem whatever is refused; :class:`Guard` answers what fails."""

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        return problem_response(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        # What was sent is not repeated: it may be long, and a token.
        parts = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()]
        return problem_response(422, "; ".join(parts))

    @app.exception_handler(UsageError)
    async def refuse_value(request: Request, error: UsageError) -> JSONResponse:
        return problem_response(422, str(error))

    @app.exception_handler(DataError)
    async def not_found(request: Request, error: DataError) -> JSONResponse:
        return problem_response(404, str(error))
