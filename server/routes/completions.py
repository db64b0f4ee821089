"""POST /v1/completions"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.completion_form import CompletionForm
from server.json_body import read_json_object
from server.service import service_of

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    service = service_of(request)
    body, num_bytes = await read_json_object(request)
    call = await service.validator.completion(body, num_bytes)
    form = CompletionForm(call, service.tokenization.tokenizer, service.system_fingerprint)
    return await service.respond(request, call, form)
