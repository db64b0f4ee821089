"""What an application answers when a route raises, or when there is no route."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.errors import ApiError, MethodNotAllowedError, UnknownUrlError, excerpt
from server.guard import api_error


def add_error_handlers(app: FastAPI) -> None:
    """Errors of routes and of the router, in the form of the path. The guard answers for the rest."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)


async def _answer_api_error(request: Request, error: Exception) -> Response:
    told = api_error(error, request.state.request_id, request.scope["path"])
    return Response(told.body(), told.status, told.headers, "application/json")


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """What the router refuses: a path it does not have, or a method that the path does not take."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {excerpt(request.url.path)}"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        refused = MethodNotAllowedError(f"{asked} is not allowed.", headers={"allow": allowed})
        return await _answer_api_error(request, refused)
    return await _answer_api_error(request, UnknownUrlError(f"{asked} does not exist on this server."))
