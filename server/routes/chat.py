"""POST /v1/chat/completions"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.chat_form import ChatForm
from server.service import service_of

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    service = service_of(request)
    return await service.answer(request, service.validator.chat, ChatForm, can_be_resumed=True)
