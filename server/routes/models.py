"""GET /v1/models and /v1/models/{id}, with the fields of OpenAI's API and of Anthropic's"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.errors import EngineDeadError, ModelNotFoundError, excerpt
from server.service import Service, service_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    service = service_of(request)
    names = service.config.served_model_names
    page = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
    return _json({"object": "list", "data": [_model(service, name) for name in names], **page})


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request) -> Response:
    service = service_of(request)
    name = request.path_params["model_id"]
    if name not in service.config.served_model_names:
        raise ModelNotFoundError(f"The model {excerpt(name)} does not exist.", param="model")
    return _json(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    try:
        max_model_len = service.engine.spec.max_model_len
    except EngineDeadError:
        max_model_len = None
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": name,
        "created": service.started,
        "created_at": datetime.fromtimestamp(service.started, UTC).isoformat(),
        "lifecycle": "active",
        "owned_by": "inflightd",
        "root": service.config.served_model_names[0],
        "parent": None,
        "max_model_len": max_model_len,
    }


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
