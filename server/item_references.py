"""Items of earlier responses that a request names instead of repeating them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from server.errors import InvalidRequestError, excerpt
from server.response_store import ResponseStore

_OUTPUT_ID = re.compile(r"[a-z]+_([0-9a-f]{32})_[0-9]+")


def output_id(kind: str, response_id: str, index: int) -> str:
    """An id for an item of a response's output: it starts with its kind, as OpenAI's do, and tells which."""
    return f"{kind}_{response_id.removeprefix('resp_')}_{index}"


async def with_referred(
    items: Sequence[dict[str, Any]], store: ResponseStore, owner: str
) -> list[dict[str, Any]]:
    """The items, with what they refer to in place of each ``item_reference``.

    Raises:
        InvalidRequestError: no stored response of the owner has put out such an item, or it is named twice,
            which could make a prompt of any size out of a short request.
    """
    found: list[dict[str, Any]] = []
    outputs: dict[str, dict[str, dict[str, Any]]] = {}
    named: set[str] = set()
    for index, item in enumerate(items):
        if item["type"] != "item_reference":
            found.append(item)
            continue
        item_id = item["id"]
        if item_id in named:
            raise _refusal(f"Item with id {excerpt(item_id)} is named twice.", index, "invalid_value")
        named.add(item_id)
        match = _OUTPUT_ID.fullmatch(item_id)
        response_id = f"resp_{match[1]}" if match else ""
        if match and response_id not in outputs:
            outputs[response_id] = await _output(response_id, store, owner)
        referred = outputs.get(response_id, {}).get(item_id)
        if referred is None:
            raise _refusal(
                f"Item with id {excerpt(item_id)} not found: it must be of the output of a stored response.",
                index,
                "item_not_found",
            )
        found.append(referred)
    return found


async def _output(response_id: str, store: ResponseStore, owner: str) -> dict[str, dict[str, Any]]:
    """The items that a response has put out, by their ids; none if there is no such response."""
    stored = await store.get(response_id, owner)
    if stored is None:
        return {}
    return {item["id"]: item for item in msgspec.json.decode(stored.body)["output"]}


def _refusal(message: str, index: int, code: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=f"input[{index}].id", code=code)
