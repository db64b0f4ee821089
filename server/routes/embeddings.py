"""POST /v1/embeddings"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.embeddings import EmbeddingsForm, EmbeddingsRequest, embeddings_call
from server.service import service_of, while_connected

router = APIRouter()


@router.post("/v1/embeddings")
async def create_embeddings(request: Request) -> Response:
    service = service_of(request)
    wire = await service.validator.parsed(EmbeddingsRequest, *await service.read(request))
    call = await embeddings_call(wire, service.validator, service.engine.spec, service.config.pooling)
    answer = service.answer_to(call, EmbeddingsForm(wire, call))
    return Response(await while_connected(request, answer.whole()), media_type="application/json")
