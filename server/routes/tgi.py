"""POST /generate, /generate_stream and /, and GET /info: Hugging Face TGI's API"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.answer import Answer
from server.context import max_context
from server.errors import ApiError
from server.guard import api_error
from server.protocol import MAX_STOP_STRINGS, GenerateParameters, GenerateRequest
from server.service import VERSION, service_of, while_connected
from server.sse import EventStream
from server.tgi_form import TgiError, TgiForm
from server.tgi_validation import generate_call

router = APIRouter()


@router.post("/generate")
async def generate(request: Request) -> Response:
    return await _answer(request, is_stream=False)


@router.post("/generate_stream")
async def generate_stream(request: Request) -> Response:
    return await _answer(request, is_stream=True)


@router.post("/")
async def generate_either(request: Request) -> Response:
    """A stream if the body says so, otherwise a list of one answer."""
    return await _answer(request, is_stream=None)


@router.get("/info")
async def info(request: Request) -> Response:
    service = service_of(request)
    try:
        spec = service.engine.spec
    except ApiError as error:
        raise TgiError(error) from error
    context = max_context(spec)
    about = {
        "model_id": service.config.served_model_names[0],
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": spec.max_num_seqs,
        "max_best_of": 1,
        "max_stop_sequences": MAX_STOP_STRINGS,
        "max_input_tokens": context - 1,
        "max_total_tokens": context,
        "validation_workers": 1,
        "max_client_batch_size": 1,
        "router": "inflightd",
        "version": VERSION,
        "sha": None,
        "docker_label": None,
    }
    return Response(msgspec.json.encode(about), media_type="application/json")


async def _answer(request: Request, *, is_stream: bool | None) -> Response:
    """``is_stream`` None leaves it to the body. Raises TgiError."""
    request_id, path = request.state.request_id, request.scope["path"]
    service = service_of(request)
    tokenization, validator = service.tokenization, service.validator
    try:
        wire = await validator.parsed(GenerateRequest, *await service.read(request))
        call = await generate_call(
            wire,
            is_stream=bool(wire.stream) if is_stream is None else is_stream,
            engine=service.engine,
            tokenization=tokenization,
            validator=validator,
        )
        parameters = wire.parameters or GenerateParameters()
        form = TgiForm(call, tokenization.tokenizer, wire.inputs, parameters, as_list=is_stream is None)
        answer = service.answer_to(call, form)
        if call.is_stream:
            return EventStream(_events(answer, request_id, path), request_id)
        return Response(await while_connected(request, answer.whole()), media_type="application/json")
    except ClientDisconnect:
        raise
    except Exception as error:
        raise TgiError(api_error(error, request_id, path)) from error


async def _events(answer: Answer, request_id: str, path: str) -> AsyncGenerator[bytes, None]:
    """The answer's events, with errors in TGI's form."""
    try:
        async with aclosing(answer.events()) as chunks:
            async for chunk in chunks:
                yield chunk
    except Exception as error:
        raise TgiError(api_error(error, request_id, path)) from error
