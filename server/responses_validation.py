"""From a body of ``/v1/responses`` to the chat that it asks for."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from server.call import Call
from server.conversation import Conversation, chat_request
from server.errors import InvalidRequestError, UnsupportedParameterError, excerpt
from server.item_references import with_referred
from server.protocol import MAX_PROMPT_TOKENS, ChatCompletionRequest, RefusalPart, WireModel
from server.response_store import ResponseStore
from server.responses_protocol import (
    AllowedTools,
    AssistantItem,
    FunctionCallItem,
    FunctionCallOutputItem,
    Item,
    ItemReference,
    MessageItem,
    Part,
    ReasoningItem,
    ResponsesRequest,
    ToolName,
)
from server.validation import Validator

_LOGPROBS = "message.output_text.logprobs"
# Known, and empty here: the tools are refused whose results they would show, and reasoning is not encrypted.
_EMPTY_INCLUDES = frozenset(
    {
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)


@dataclass(frozen=True, slots=True)
class ResponseCall:
    """A valid request for a response.

    Attributes:
        items: what the response answers, from the first item of the first response that led to it.
        settings: the fields of the response that repeat what was asked for.
    """

    call: Call
    items: list[dict[str, Any]]
    settings: dict[str, Any]
    is_stored: bool
    is_background: bool


async def response_call(
    wire: ResponsesRequest, validator: Validator, store: ResponseStore, owner: str
) -> ResponseCall:
    """What a request asks for. Raises ApiError."""
    arrival = time.monotonic()
    chat, items = await _chat(wire, store, owner)
    call = await validator.chat_of(
        chat, arrival, id_prefix="resp_", prompt_name="input", limit_name="max_output_tokens"
    )
    return ResponseCall(
        call,
        items,
        _settings(wire),
        is_stored=wire.store is not False,
        is_background=bool(wire.background),
    )


async def count_input_tokens(
    wire: ResponsesRequest, validator: Validator, store: ResponseStore, owner: str
) -> int:
    """Tokens of the prompt that a request would have, whether or not they fit. Raises ApiError."""
    chat, _ = await _chat(wire, store, owner)
    prompt = await validator.chat_prompt(chat, MAX_PROMPT_TOKENS, "input")
    return len(prompt.token_ids)


async def _chat(
    wire: ResponsesRequest, store: ResponseStore, owner: str
) -> tuple[ChatCompletionRequest, list[dict[str, Any]]]:
    """The chat, and the items that it is made of."""
    _check(wire)
    items = await _earlier_items(wire.previous_response_id, store, owner)
    items += await with_referred(_items(wire), store, owner)
    if not items:
        raise InvalidRequestError("'input' is empty: send text.", param="input", code="invalid_value")
    tools, choice = _tools(wire)
    has_logprobs = wire.include is not None and _LOGPROBS in wire.include
    chat = chat_request(
        {
            "model": wire.model,
            "messages": _messages(wire.instructions, items),
            "max_completion_tokens": wire.max_output_tokens,
            "temperature": wire.temperature,
            "top_p": wire.top_p,
            "top_k": wire.top_k,
            "seed": wire.seed,
            "logprobs": has_logprobs or None,
            "top_logprobs": wire.top_logprobs if has_logprobs else None,
            "tools": tools or None,
            "tool_choice": choice if tools else None,
            "parallel_tool_calls": wire.parallel_tool_calls if tools else None,
            "response_format": _response_format(wire),
            "reasoning_effort": None if wire.reasoning is None else wire.reasoning.effort,
            "thinking_token_budget": wire.thinking_token_budget,
            "stream": wire.stream,
            "priority": wire.priority,
            "cache_salt": wire.cache_salt,
        }
    )
    return chat, items


def _check(wire: ResponsesRequest) -> None:
    if wire.background and wire.stream:
        raise UnsupportedParameterError(
            "'stream' is not supported together with 'background'. Leave one of them out.", param="stream"
        )
    if wire.background and wire.store is False:
        raise InvalidRequestError(
            "'background' needs 'store': a response that is not kept could not be asked for.",
            param="background",
            code="invalid_value",
        )
    for index, name in enumerate(wire.include or ()):
        if name != _LOGPROBS and name not in _EMPTY_INCLUDES:
            raise InvalidRequestError(
                f"Invalid value for 'include[{index}]': {excerpt(name)}.",
                param=f"include[{index}]",
                code="invalid_value",
            )


async def _earlier_items(response_id: str | None, store: ResponseStore, owner: str) -> list[dict[str, Any]]:
    if response_id is None:
        return []
    earlier = await store.get(response_id, owner)
    if earlier is None:
        raise InvalidRequestError(
            f"Previous response with id {excerpt(response_id)} not found.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    response = msgspec.json.decode(earlier.body)
    if response["status"] == "in_progress":
        raise InvalidRequestError(
            f"Previous response with id {excerpt(response_id)} is not complete.",
            param="previous_response_id",
            code="previous_response_not_complete",
        )
    items: list[dict[str, Any]] = msgspec.json.decode(earlier.items)
    return items + list(response["output"])


def _items(wire: ResponsesRequest) -> list[dict[str, Any]]:
    """The input as the API shows it afterwards, but for references: each item with an id, texts in parts."""
    if isinstance(wire.input, str):
        return [_message("user", [{"type": "input_text", "text": wire.input}], None)]
    return [_item(item) for item in wire.input]


def _item(item: Item) -> dict[str, Any]:
    match item:
        case ItemReference():
            return {"type": "item_reference", "id": item.id}
        case MessageItem():
            texts = [item.content] if isinstance(item.content, str) else [p.text for p in item.content]
            return _message(item.role, [{"type": "input_text", "text": text} for text in texts], item.id)
        case AssistantItem():
            said = [item.content] if isinstance(item.content, str) else item.content
            return _message("assistant", [_said(part) for part in said], item.id)
        case FunctionCallItem():
            return {
                "id": item.id or _new_id("fc"),
                "type": "function_call",
                "status": "completed",
                "call_id": item.call_id,
                "name": item.name,
                "arguments": item.arguments,
            }
        case FunctionCallOutputItem():
            return {
                "id": item.id or _new_id("fco"),
                "type": "function_call_output",
                "status": "completed",
                "call_id": item.call_id,
                "output": _text(item.output),
            }
        case ReasoningItem():
            # A summary is all that some servers tell of it.
            parts_of_it = item.content or item.summary or []
            return {
                "id": item.id or _new_id("rs"),
                "type": "reasoning",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": part.text} for part in parts_of_it],
            }


def _said(part: str | Part | RefusalPart) -> dict[str, Any]:
    if isinstance(part, RefusalPart):
        return {"type": "refusal", "refusal": part.refusal}
    text = part if isinstance(part, str) else part.text
    return {"type": "output_text", "text": text, "annotations": []}


def _message(role: str, parts: list[dict[str, Any]], item_id: str | None) -> dict[str, Any]:
    return {
        "id": item_id or _new_id("msg"),
        "type": "message",
        "status": "completed",
        "role": role,
        "content": parts,
    }


def _text(content: str | Sequence[Part]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _new_id(kind: str) -> str:
    """An id of an item of the input that starts with its kind, as OpenAI's do."""
    return f"{kind}_{uuid.uuid4().hex}"


def _messages(instructions: str | None, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat that instructions and items make."""
    conversation = Conversation()
    if instructions is not None:
        conversation.say("system", instructions)
    for item in items:
        match item["type"]:
            case "message":
                # A refusal is an answer like any other to a template.
                texts = [part["refusal" if part["type"] == "refusal" else "text"] for part in item["content"]]
                conversation.say(item["role"], "\n".join(texts))
            case "function_call":
                conversation.call_tool(item["call_id"], item["name"], item["arguments"])
            case "function_call_output":
                conversation.answer_tool(item["call_id"], item["output"])
            case "reasoning":
                conversation.think("\n".join(part["text"] for part in item["content"]))
    return conversation.messages


def _tools(wire: ResponsesRequest) -> tuple[list[dict[str, Any]], str | dict[str, Any] | None]:
    """Tools and their choice as a chat has them."""
    tools = wire.tools or []
    choice: str | dict[str, Any] | None = None
    match wire.tool_choice:
        case AllowedTools() as allowed:
            names = {tool.name for tool in allowed.tools}
            if unknown := names - {tool.name for tool in tools}:
                raise InvalidRequestError(
                    f"'tool_choice.tools' has {excerpt(min(unknown))}, which 'tools' has not.",
                    param="tool_choice",
                    code="invalid_value",
                )
            tools = [tool for tool in tools if tool.name in names]
            choice = allowed.mode
        case ToolName(name=name):
            choice = {"type": "function", "function": {"name": name}}
        case mode:
            choice = mode
    return [
        {
            "type": "function",
            "function": tool.model_dump(
                include={"name", "description", "parameters", "strict"}, exclude_none=True
            ),
        }
        for tool in tools
    ], choice


def _response_format(wire: ResponsesRequest) -> dict[str, Any] | None:
    form = None if wire.text is None else wire.text.format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    for name, value in (("name", form.name), ("schema", form.json_schema)):
        if value is None:
            raise InvalidRequestError(
                f"Missing required parameter: 'text.format.{name}'.",
                param=f"text.format.{name}",
                code="missing_required_parameter",
            )
    schema: dict[str, Any] = {"name": form.name, "schema": form.json_schema}
    schema |= {} if form.strict is None else {"strict": form.strict}
    schema |= {} if form.description is None else {"description": form.description}
    return {"type": "json_schema", "json_schema": schema}


def _settings(wire: ResponsesRequest) -> dict[str, Any]:
    choice = wire.tool_choice or "auto"
    return {
        "background": bool(wire.background),
        "instructions": wire.instructions,
        "max_output_tokens": wire.max_output_tokens,
        "max_tool_calls": None,
        "metadata": wire.metadata or {},
        "parallel_tool_calls": wire.parallel_tool_calls is not False,
        "previous_response_id": wire.previous_response_id,
        "reasoning": {"effort": None, "summary": None, **_dumped(wire.reasoning)},
        "service_tier": "default",
        "store": wire.store is not False,
        "temperature": 1.0 if wire.temperature is None else wire.temperature,
        "text": {"format": {"type": "text"}, **_dumped(wire.text)},
        "tool_choice": choice if isinstance(choice, str) else _dumped(choice),
        "tools": [_dumped(tool) for tool in wire.tools or ()],
        "top_logprobs": wire.top_logprobs or 0,
        "top_p": 1.0 if wire.top_p is None else wire.top_p,
        "truncation": "disabled",
        "user": wire.user,
    }


def _dumped(model: WireModel | None) -> dict[str, Any]:
    return {} if model is None else model.model_dump(by_alias=True, exclude_none=True)
