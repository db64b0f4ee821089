"""/v1/responses: OpenAI's API whose answers are kept and can be gone on from"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answer import Answer
from server.api_keys import cache_scope
from server.background_responses import BackgroundResponses
from server.errors import (
    InvalidRequestError,
    ResponseNotFoundError,
    ShuttingDownError,
    UnsupportedParameterError,
    excerpt,
)
from server.guard import api_error
from server.json_body import read_json_object
from server.response_store import ResponseStore, StoredResponse
from server.responses_form import ResponsesForm
from server.responses_protocol import ResponsesRequest
from server.responses_validation import ResponseCall, count_input_tokens, response_call
from server.service import service_of, while_connected
from server.sse import EventStream

router = APIRouter()
_MAX_LIMIT, _DEFAULT_LIMIT = 100, 20


@router.post("/v1/responses")
async def create_response(request: Request) -> Response:
    service = service_of(request)
    wire = await service.validator.parsed(ResponsesRequest, *await service.read(request))
    owner = _owner()
    asked = await response_call(wire, service.validator, service.responses, owner)
    form = ResponsesForm(asked, service.tokenization.tokenizer)
    answer = service.answer_to(asked.call, form)
    keeping = _Keeping(service.responses, asked, form, owner)
    request_id, path = request.state.request_id, request.scope["path"]
    if asked.is_background:
        service.background.check_room()
        form.waiting()
        waiting = await keeping.keep()
        service.background.start(asked.call.id, _work(answer, keeping, service.background, request_id, path))
        return Response(waiting, media_type="application/json")
    if asked.call.is_stream:
        return EventStream(_events(answer, keeping, request_id, path), request_id)
    whole = await while_connected(request, answer.whole())
    await keeping.keep()
    return Response(whole, media_type="application/json")


@router.post("/v1/responses/input_tokens")
async def count_tokens_of_input(request: Request) -> Response:
    service = service_of(request)
    wire = await service.validator.parsed(ResponsesRequest, *await read_json_object(request))
    num_tokens = await count_input_tokens(wire, service.validator, service.responses, _owner())
    return _json({"object": "response.input_tokens", "input_tokens": num_tokens})


@router.get("/v1/responses/{response_id}")
async def retrieve_response(request: Request) -> Response:
    if request.query_params.get("stream", "false").lower() not in ("false", "0"):
        raise UnsupportedParameterError(
            "'stream' is not supported for responses that are complete. Leave it out.", param="stream"
        )
    return Response(await _body(request), media_type="application/json")


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(request: Request) -> Response:
    query = request.query_params
    limit, order, after = (
        query.get("limit", str(_DEFAULT_LIMIT)),
        query.get("order", "desc"),
        query.get("after"),
    )
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= _MAX_LIMIT):
        raise _invalid("limit", f"a number from 1 to {_MAX_LIMIT}")
    if order not in ("asc", "desc"):
        raise _invalid("order", "'asc' or 'desc'")
    items: list[dict[str, Any]] = msgspec.json.decode((await _found(request)).items)
    if order == "desc":
        items.reverse()
    if after is not None:
        place = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise _invalid("after", "the id of one of the items")
        items = items[place + 1 :]
    shown = items[: int(limit)]
    return _json(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(items) > len(shown),
        }
    )


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(request: Request) -> Response:
    found = await _found(request)
    if not msgspec.json.decode(found.body)["background"]:
        raise InvalidRequestError(
            "Only responses with 'background' can be cancelled; close the stream instead."
        )
    await service_of(request).cancel(found.id)
    return Response(await _body(request), media_type="application/json")


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request) -> Response:
    response_id = (await _found(request)).id
    service = service_of(request)
    await service.cancel(response_id)
    if not await service.responses.delete(response_id, _owner()):
        raise _not_found(response_id)
    return _json({"id": response_id, "object": "response", "deleted": True})


class _Keeping:
    """Stores a response when it is complete, if it is to be stored."""

    def __init__(self, store: ResponseStore, asked: ResponseCall, form: ResponsesForm, owner: str) -> None:
        self._store = store
        self._asked = asked
        self._owner = owner
        self.form = form

    async def keep(self) -> bytes:
        """Returns what is stored; nothing as long as there is nothing to store."""
        response = self.form.response
        if response is None or not self._asked.is_stored:
            return b""
        body, items = msgspec.json.encode(response), msgspec.json.encode(self._asked.items)
        await self._store.put(StoredResponse(response["id"], self._owner, body, items))
        return body


async def _events(
    answer: Answer, keeping: _Keeping, request_id: str, path: str
) -> AsyncGenerator[bytes, None]:
    """The answer's events. The response is stored before the event that says that it is complete."""
    form = keeping.form
    try:
        async with aclosing(answer.events()) as chunks:
            async for chunk in chunks:
                await keeping.keep()
                yield chunk
    except Exception as error:
        if not form.has_begun:
            raise
        failure = form.failed(api_error(error, request_id, path))
        await keeping.keep()
        yield failure


async def _work(
    answer: Answer, keeping: _Keeping, background: BackgroundResponses, request_id: str, path: str
) -> None:
    """Answers in the background, and stores what came of it."""
    try:
        await answer.whole()
    except asyncio.CancelledError:
        if background.is_closing:
            keeping.form.failed(ShuttingDownError())
        else:
            keeping.form.cancelled()
    except Exception as error:
        keeping.form.failed(api_error(error, request_id, path))
    await asyncio.shield(keeping.keep())  # what is complete stays so


async def _body(request: Request) -> bytes:
    """The response as it is now."""
    found = await _found(request)
    if msgspec.json.decode(found.body)["status"] != "in_progress":
        return found.body
    if await service_of(request).is_running(found.id):
        return found.body
    # It is complete by now, or was running when its server ended.
    response = msgspec.json.decode((await _found(request)).body)
    if response["status"] == "in_progress":
        error = {"code": "server_error", "message": "The server ended before the response was complete."}
        response |= {"status": "failed", "error": error}
    return msgspec.json.encode(response)


async def _found(request: Request) -> StoredResponse:
    response_id = request.path_params["response_id"]
    found = await service_of(request).responses.get(response_id, _owner())
    if found is None:
        raise _not_found(response_id)
    return found


def _owner() -> str:
    return cache_scope.get() or ""


def _not_found(response_id: str) -> ResponseNotFoundError:
    return ResponseNotFoundError(f"Response with id {excerpt(response_id)} not found.")


def _invalid(name: str, expected: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid '{name}': expected {expected}.", param=name, code="invalid_value")


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
