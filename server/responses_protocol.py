"""The body of OpenAI's ``/v1/responses``, as clients write it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from server.protocol import (
    INT32_MAX,
    INT64_MAX,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    ModelFields,
    Number,
    RefusalPart,
    WireModel,
    expected,
    tag_of_part,
    tag_of_text,
)

_MAX_METADATA = 16
_MAX_ID_CHARS = 256
_MAX_TOOLS = 1024
_PART_TYPES = ("input_text", "output_text", "text")
_ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _known_part(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in _PART_TYPES:
        raise PydanticCustomError(
            "unsupported_content_type",
            "is not supported: this model takes content parts of type 'input_text' and 'output_text' only",
        )
    return value


def _known_item(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in _ITEM_TYPES:
        raise PydanticCustomError(
            "unsupported_item_type",
            "is not supported: this server takes items of type message, function_call, function_call_output, "
            "reasoning and item_reference only",
        )
    return value


def _tag_of_item(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type", "message")
    if kind == "message" and value.get("role") == "assistant":
        return "<said>"
    return f"<{kind}>" if isinstance(kind, str) else None


def _function_only(value: Any) -> Any:
    if isinstance(value, str) and value != "function":
        raise PydanticCustomError(
            "unsupported_tool_type", "is not supported: this server knows tools of type 'function' only"
        )
    return value


def _few_short_pairs(value: dict[str, str]) -> dict[str, str]:
    if len(value) > _MAX_METADATA or any(len(k) > 64 or len(v) > 512 for k, v in value.items()):
        raise PydanticCustomError(
            "invalid_value",
            f"expected {_MAX_METADATA} pairs at most, names of up to 64 and texts of up to 512 characters",
        )
    return value


_Id = Annotated[str, Field(min_length=1, max_length=_MAX_ID_CHARS)]


class Part(WireModel):
    """A piece of text; parts of an answer that comes back have the fields from ``annotations`` on."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


_Text = Annotated[
    Annotated[str, Tag("<one>")]
    | Annotated[list[Annotated[Part, BeforeValidator(_known_part)]], Field(fail_fast=True), Tag("<many>")],
    Discriminator(tag_of_text, **expected("a string or an array of content parts")),
]

_Said = Annotated[
    Annotated[str, Tag("<one>")]
    | Annotated[
        list[
            Annotated[
                Annotated[Part, BeforeValidator(_known_part), Tag("<text>")]
                | Annotated[RefusalPart, Tag("<refusal>")],
                Discriminator(tag_of_part),
            ]
        ],
        Field(fail_fast=True),
        Tag("<many>"),
    ],
    Discriminator(tag_of_text, **expected("a string or an array of content parts")),
]


class _MessageFields(WireModel):
    type: Literal["message"] | None = None
    id: _Id | None = None
    status: str | None = None
    phase: str | None = None


class MessageItem(_MessageFields):
    """What anybody but the model says; what it says itself is an ``AssistantItem``."""

    role: Literal["user", "assistant", "system", "developer"]
    content: _Text


class AssistantItem(_MessageFields):
    """An earlier answer, which may have been a refusal."""

    role: Literal["assistant"]
    content: _Said


class FunctionCallItem(WireModel):
    type: Literal["function_call"]
    call_id: _Id
    name: str
    arguments: str
    id: _Id | None = None
    status: str | None = None


class FunctionCallOutputItem(WireModel):
    type: Literal["function_call_output"]
    call_id: _Id
    output: _Text
    id: _Id | None = None
    status: str | None = None


class ReasoningPart(WireModel):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(WireModel):
    type: Literal["reasoning"]
    id: _Id | None = None
    summary: list[ReasoningPart] | None = None
    content: list[ReasoningPart] | None = None
    encrypted_content: str | None = None
    status: str | None = None


class ItemReference(WireModel):
    type: Literal["item_reference"]
    id: _Id


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[AssistantItem, Tag("<said>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[ItemReference, Tag("<item_reference>")],
    Discriminator(_tag_of_item, **expected("an item with a 'type'")),
    BeforeValidator(_known_item),
]


class FunctionTool(WireModel):
    type: Annotated[Literal["function"], BeforeValidator(_function_only)]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolName(WireModel):
    type: Annotated[Literal["function"], BeforeValidator(_function_only)]
    name: str


class AllowedTools(WireModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolName], Field(min_length=1, max_length=_MAX_TOOLS, fail_fast=True)]


def _tag_of_choice(value: Any) -> str | None:
    if isinstance(value, str):
        return "<mode>"
    if isinstance(value, dict):
        return "<allowed>" if value.get("type") == "allowed_tools" else "<function>"
    return None


class TextFormat(WireModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(WireModel):
    format: TextFormat | None = None


class Reasoning(WireModel):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: str | None = None


class ResponsesRequest(ModelFields):
    input: Annotated[
        Annotated[str, Tag("<one>")]
        | Annotated[list[Item], Field(max_length=MAX_MESSAGES, fail_fast=True), Tag("<many>")],
        Discriminator(tag_of_text, **expected("a string or an array of items")),
    ]
    instructions: str | None = None
    previous_response_id: _Id | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    temperature: Annotated[Number, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: Annotated[list[str], Field(max_length=64, fail_fast=True)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=_MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
            | Annotated[ToolName, Tag("<function>")]
            | Annotated[AllowedTools, Tag("<allowed>")],
            Discriminator(_tag_of_choice, **expected("a string or an object")),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    thinking_token_budget: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    metadata: Annotated[dict[str, str], AfterValidator(_few_short_pairs)] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    background: bool | None = None
    priority: Annotated[int, Field(ge=-INT32_MAX, le=INT32_MAX)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    user: str | None = None
