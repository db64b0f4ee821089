"""A line in the log for everything that is asked of the operator's interface."""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api_keys import ApiKeys
from server.errors import excerpt

_log = logging.getLogger(__name__)
_FIELDS = "admin_fields"


def note(request: Request, **fields: str | int) -> None:
    """Has the line of this request say more."""
    request.scope.setdefault("state", {}).setdefault(_FIELDS, {}).update(fields)


class AdminLog:
    """An ASGI layer outside of the guard, so that refused requests have their line too."""

    def __init__(self, app: ASGIApp, *, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys
        _log.setLevel(logging.INFO)  # whatever level an operator chooses for the rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None
        request_id: str | None = None

        async def noting_send(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = Headers(raw=message["headers"]).get("x-request-id")
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            fields = {
                "method": excerpt(scope["method"])[1:-1],
                "path": excerpt(scope["path"])[1:-1],
                "status": status,
                "key": self._keys.name_of(dict(scope["headers"])),
                "x_request_id": request_id,
                **scope.get("state", {}).get(_FIELDS, {}),
            }
            _log.info("admin request", extra={"fields": fields})
