"""POST /v1/completions"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.completion_form import CompletionForm
from server.service import service_of

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    service = service_of(request)
    return await service.answer(request, service.validator.completion, CompletionForm, can_be_resumed=True)
