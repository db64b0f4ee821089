"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.anthropic_form import AnthropicForm
from server.anthropic_protocol import CountTokensRequest, MessagesRequest
from server.anthropic_validation import count_tokens, messages_call
from server.call import Call
from server.json_body import read_json_object
from server.service import service_of

router = APIRouter()


@router.post("/v1/messages")
async def create_message(request: Request) -> Response:
    service = service_of(request)

    async def validate(body: dict[str, Any], num_bytes: int) -> Call:
        wire = await service.validator.parsed(MessagesRequest, body, num_bytes)
        return await messages_call(wire, service.validator)

    return await service.answer(request, validate, AnthropicForm)


@router.post("/v1/messages/count_tokens")
async def count_message_tokens(request: Request) -> Response:
    validator = service_of(request).validator
    wire = await validator.parsed(CountTokensRequest, *await read_json_object(request))
    num_tokens = await count_tokens(wire, validator)
    return Response(msgspec.json.encode({"input_tokens": num_tokens}), media_type="application/json")
