"""From Anthropic's way to ask for an answer to the chat that OpenAI's would be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from server.anthropic_protocol import (
    MessageParam,
    MessagesRequest,
    PromptFields,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from server.call import Call
from server.conversation import Conversation, chat_request
from server.errors import InvalidRequestError
from server.protocol import INT32_MAX, MAX_PROMPT_TOKENS
from server.validation import Validator

_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


async def messages_call(wire: MessagesRequest, validator: Validator) -> Call:
    """The call that a request asks for. Raises ApiError."""
    arrival = time.monotonic()
    chat = chat_request(
        {
            **_prompt_fields(wire),
            "max_tokens": wire.max_tokens,
            "stop": wire.stop_sequences or None,
            "stream": wire.stream,
            "temperature": wire.temperature,
            "top_p": wire.top_p,
            "top_k": wire.top_k,
            "thinking_token_budget": _thinking_budget(wire) if validator.bounds_thinking else None,
        }
    )
    return await validator.chat_of(chat, arrival, id_prefix="msg_")


def _thinking_budget(wire: MessagesRequest) -> int | None:
    """Tokens that thoughts may take."""
    thinking = wire.thinking
    if thinking is None or thinking.type != "enabled" or thinking.budget_tokens is None:
        return None
    return min(thinking.budget_tokens, INT32_MAX)


async def count_tokens(wire: PromptFields, validator: Validator) -> int:
    """Tokens of the prompt that a request would have, whether or not they fit. Raises ApiError."""
    chat = chat_request(_prompt_fields(wire))
    prompt = await validator.chat_prompt(chat, MAX_PROMPT_TOKENS, "messages")
    return len(prompt.token_ids)


def _prompt_fields(wire: PromptFields) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": wire.model, "messages": _messages(wire)}
    if wire.messages[-1].role == "assistant":
        last = fields["messages"][-1] if fields["messages"] else {}  # thoughts that are redacted say nothing
        if last.get("role") != "assistant" or last.get("content") is None or "tool_calls" in last:
            raise InvalidRequestError(
                "The answer cannot go on from the last message: give its text, or the results of its calls.",
                param=f"messages[{len(wire.messages) - 1}].content",
                code="invalid_value",
            )
        fields["continue_final_message"] = True
    if wire.thinking is not None:
        is_on = wire.thinking.type != "disabled"
        fields["chat_template_kwargs"] = {"enable_thinking": is_on}
        fields["include_reasoning"] = is_on
    if wire.output_config is not None and wire.output_config.format is not None:
        schema = {"name": "output", "schema": wire.output_config.format.json_schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if wire.tools:
        fields["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "parameters": tool.input_schema,
                    **({} if tool.description is None else {"description": tool.description}),
                    **({} if tool.strict is None else {"strict": tool.strict}),
                },
            }
            for tool in wire.tools
        ]
        if wire.tool_choice is not None:
            fields["tool_choice"] = _tool_choice(wire.tool_choice)
            if wire.tool_choice.disable_parallel_tool_use:
                fields["parallel_tool_calls"] = False
    return fields


def _tool_choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.type != "tool":
        return _TOOL_CHOICES[choice.type]
    if choice.name is None:
        raise InvalidRequestError(
            "Missing required parameter: 'tool_choice.name'.",
            param="tool_choice.name",
            code="missing_required_parameter",
        )
    return {"type": "function", "function": {"name": choice.name}}


def _messages(wire: PromptFields) -> list[dict[str, Any]]:
    conversation = Conversation()
    if wire.system is not None:
        conversation.say("system", _text(wire.system))
    for index, message in enumerate(wire.messages):
        _add(message, index, conversation)
    return conversation.messages


def _add(message: MessageParam, index: int, conversation: Conversation) -> None:
    """Adds a turn. What one side says in several turns in a row is one message, as with Anthropic."""
    if isinstance(message.content, str):
        conversation.say(message.role, message.content, joins=True)
        return
    for position, block in enumerate(message.content):
        role = "user" if isinstance(block, ToolResultBlock) else "assistant"
        if not isinstance(block, TextBlock) and message.role != role:
            raise InvalidRequestError(
                f"A message of the role '{message.role}' has no blocks of type '{block.type}'.",
                param=f"messages[{index}].content[{position}].type",
                code="invalid_value",
            )
        match block:
            case TextBlock():
                conversation.say(message.role, block.text, joins=True)
            case ThinkingBlock():
                conversation.think(block.thinking)
            case RedactedThinkingBlock():
                pass  # of another model: nobody here can read it
            case ToolUseBlock():
                conversation.call_tool(block.id, block.name, msgspec.json.encode(block.input).decode())
            case ToolResultBlock():
                conversation.answer_tool(block.tool_use_id, _text(block.content or ""))


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
