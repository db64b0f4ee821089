"""The bodies of Anthropic's ``/v1/messages`` and ``/v1/messages/count_tokens``, as clients write them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from server.protocol import (
    INT32_MAX,
    INT64_MAX,
    MAX_MESSAGES,
    MAX_STOP_STRINGS,
    ModelFields,
    Number,
    StopString,
    WireModel,
    expected,
    tag_of_text,
)

_BLOCK_TYPES = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")


def _known_block(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] not in _BLOCK_TYPES:
        raise PydanticCustomError(
            "unsupported_content_type",
            "is not supported: this server takes content blocks of type text, thinking, tool_use and "
            "tool_result only",
        )
    return value


def _tag_of_block(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if isinstance(kind, str) else None


class TextBlock(WireModel):
    type: Literal["text"]
    text: str


_Texts = Annotated[
    Annotated[str, Tag("<one>")] | Annotated[list[TextBlock], Field(fail_fast=True), Tag("<many>")],
    Discriminator(tag_of_text, **expected("a string or an array of text blocks")),
]


class ThinkingBlock(WireModel):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(WireModel):
    type: Literal["redacted_thinking"]
    data: str | None = None


class ToolUseBlock(WireModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(WireModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: _Texts | None = None
    is_error: bool | None = None


_Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(_tag_of_block, **expected("a content block with a 'type'")),
    BeforeValidator(_known_block),
]


class MessageParam(WireModel):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag("<one>")]
        | Annotated[list[_Block], Field(min_length=1, fail_fast=True), Tag("<many>")],
        Discriminator(tag_of_text, **expected("a string or an array of content blocks")),
    ]


class Tool(WireModel):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None


class ToolChoice(WireModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(WireModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None


class OutputFormat(WireModel):
    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(WireModel):
    format: OutputFormat | None = None


class PromptFields(ModelFields):
    """What makes up the prompt."""

    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: _Texts | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class CountTokensRequest(PromptFields):
    pass


class MessagesRequest(PromptFields):
    max_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)]
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = (
        None
    )
    stream: bool | None = None
    temperature: Annotated[Number, Field(ge=0.0, le=1.0)] | None = None
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
