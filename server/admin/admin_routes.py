"""The routes of the operator's interface"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.admin.admin_log import note
from server.admin.admin_protocol import AdminBody, LogLevelBody, ProfileBody, read_admin_body
from server.admin.chrome_trace import chrome_trace
from server.admin.operated_server import OperatedServer
from server.errors import InvalidRequestError, excerpt
from server.logs import log_level
from server.service import while_connected

router = APIRouter()


class RequestNotFoundError(InvalidRequestError):
    status = 404
    default_code = "request_not_found"


@router.get("/admin/status")
async def status(request: Request) -> Response:
    return _json(await _operated(request).status())


@router.post("/admin/drain")
async def drain(request: Request) -> Response:
    """No new requests; those that run or wait go on to their end."""
    return await _take_requests(request, takes=False)


@router.post("/admin/undrain")
async def undrain(request: Request) -> Response:
    return await _take_requests(request, takes=True)


@router.get("/admin/requests")
async def list_requests(request: Request) -> Response:
    return _json({"data": await _operated(request).requests()})


@router.post("/admin/requests/{request_id:path}/abort")
async def abort_request(request: Request) -> Response:
    request_id = request.path_params["request_id"]
    await read_admin_body(request, AdminBody)
    aborted = await _operated(request).abort(request_id)
    note(request, aborted=len(aborted))
    if not aborted:
        raise RequestNotFoundError(f"No request with id {excerpt(request_id)} waits or runs.")
    return _json({"aborted": aborted})


@router.post("/admin/prefix_cache/flush")
async def flush_prefix_cache(request: Request) -> Response:
    await read_admin_body(request, AdminBody)
    num_blocks = await _operated(request).engine.flush_prefix_cache()
    note(request, flushed_blocks=num_blocks)
    return _json({"flushed_blocks": num_blocks})


@router.get("/admin/log_level")
async def tell_log_level(request: Request) -> Response:
    return _json({"level": log_level()})


@router.put("/admin/log_level")
async def change_log_level(request: Request) -> Response:
    """Of all processes, until they end."""
    body = await read_admin_body(request, LogLevelBody)
    note(request, old_level=log_level(), new_level=body.level)
    await _operated(request).set_log_level(body.level)
    return _json({"level": body.level})


@router.post("/admin/profile")
async def profile(request: Request) -> Response:
    """The next steps as a Chrome trace. Waits for them, or for so many seconds."""
    body = await read_admin_body(request, ProfileBody)
    taking = _operated(request).engine.profile(body.num_steps, body.seconds)
    phases = await while_connected(request, taking)
    note(request, profiled_phases=len(phases))
    return _json(chrome_trace(phases))


async def _take_requests(request: Request, *, takes: bool) -> Response:
    await read_admin_body(request, AdminBody)
    operated = _operated(request)
    await operated.take_requests(takes)
    shown = await operated.status()
    note(request, running=shown["running"], waiting=shown["waiting"])
    return _json(shown)


def _operated(request: Request) -> OperatedServer:
    operated: OperatedServer = request.app.state.operated
    return operated


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
