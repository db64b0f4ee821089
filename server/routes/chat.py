"""POST /v1/chat/completions"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.chat_form import ChatForm
from server.service import service_of

router = APIRouter()


async def create_chat_completion(request: Request) -> Response:
    service = service_of(request)
    return await service.answer(request, service.validator.chat, ChatForm, can_be_resumed=True)


# Without FastAPI's part of a route, which keeps three stacks of exits for as long as an answer streams.
router.add_route("/v1/chat/completions", create_chat_completion, methods=["POST"])
