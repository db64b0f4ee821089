"""GET /health/live, /health/ready, /health, /version and /metrics"""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response

from server.errors import ApiError, DrainingError, EngineDeadError, ShuttingDownError
from server.service import VERSION, service_of

router = APIRouter()
_OK = b'{"status":"ok"}'


@router.api_route("/health/live", methods=["GET", "HEAD"])
async def live() -> Response:
    """This process answers, whatever the engine does."""
    return Response(_OK, media_type="application/json")


@router.api_route("/health", methods=["GET", "HEAD"])
@router.api_route("/health/ready", methods=["GET", "HEAD"])
async def ready(request: Request) -> Response:
    """The engine takes requests and gets on. ``/health`` means the same, as in vLLM."""
    service = service_of(request)
    if not service.is_ready:
        error: ApiError = EngineDeadError("not ready")
        if service.is_draining:
            error = ShuttingDownError()
        elif not service.takes_requests:
            error = DrainingError()
        # Not raised: a probe a second would fill the log.
        return Response(error.body(), error.status, error.headers, "application/json")
    return Response(_OK, media_type="application/json")


@router.get("/version")
async def version() -> Response:
    return Response(msgspec.json.encode({"version": VERSION}), media_type="application/json")


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(await service_of(request).metrics_page(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
