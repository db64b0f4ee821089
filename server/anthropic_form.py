"""Answers of ``/v1/messages``, as Anthropic writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jiter
import msgspec

from server.answer import Usage
from server.call import Call
from server.choice import Choice
from server.parsing.deltas import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from server.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# How text is added to each kind of block: the type of the delta, and the name of its text.
_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


class AnthropicForm:
    """One message whose content is a list of blocks, opened, filled and closed one after the other."""

    def __init__(self, call: Call, tokenizer: Tokenizer, system_fingerprint: str) -> None:
        self._call = call
        self._content: list[dict[str, Any]] = []
        self._open_block: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._before_text = b""
        self._end: tuple[str, str | None] = ("end_turn", None)

    def first(self, choice: Choice) -> bytes:
        num_prompt = len(self._call.requests[0].prompt_token_ids)
        usage = _usage(Usage(num_prompt, 0, choice.num_cached_tokens))
        return _event("message_start", message=self._message(None, None, usage)) + _event("ping")

    def piece(self, choice: Choice, text: str) -> bytes:
        return self._written(choice.take_piece(text))

    def last(self, choice: Choice) -> bytes:
        rest = self._written(choice.take_deltas())
        self._end = _end_of(choice)
        is_empty = self._open_block is None and not self._content
        opening = self._open({"type": "text", "text": ""}) if is_empty else b""
        return rest + opening + self._close()

    def end(self, usage: Usage) -> bytes:
        stop_reason, stop_sequence = self._end
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        return _event("message_delta", delta=delta, usage=_usage(usage)) + _event("message_stop")

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        [choice] = choices
        self._written(choice.take_whole())
        self.last(choice)
        return _encode(self._message(*self._end, _usage(usage)))

    def _written(self, deltas: Sequence[Delta]) -> bytes:
        return b"".join([self._delta(delta) for delta in deltas])

    def _delta(self, delta: Delta) -> bytes:
        match delta:
            case ContentDelta(text=text):
                return self._text({"type": "text", "text": ""}, text)
            case ReasoningDelta(text=text):
                # Nobody but Anthropic signs what a model thought; clients want the field.
                return self._text({"type": "thinking", "thinking": "", "signature": ""}, text)
            case ToolCallStart(name=name, id=call_id):
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return self._close() + self._open(block)
            case ToolCallArguments(text=text):
                return self._add(text)
            case ToolCallEnd():
                return self._close()

    def _text(self, block: dict[str, Any], text: str) -> bytes:
        """Adds to the open block if it is of the type of ``block``, which is opened otherwise."""
        if self._open_block is not None and self._open_block["type"] == block["type"]:
            return self._add(text)
        return self._close() + self._open(block) + self._add(text)

    def _add(self, text: str) -> bytes:
        self._pieces.append(text)
        return b"".join((self._before_text, _encode(text), b"}}\n\n"))

    def _open(self, block: dict[str, Any]) -> bytes:
        self._open_block = block
        index, (kind, name) = len(self._content), _DELTAS[block["type"]]
        self._before_text = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":'
            b'{"type":"%s","%s":' % (index, kind.encode(), name.encode())
        )
        return _event("content_block_start", index=index, content_block=block)

    def _close(self) -> bytes:
        block, self._open_block = self._open_block, None
        if block is None:
            return b""
        text = "".join(self._pieces)
        self._pieces.clear()
        if block["type"] == "tool_use":
            block["input"] = _input(text)
        else:
            block[block["type"]] = text
        self._content.append(block)
        return _event("content_block_stop", index=len(self._content) - 1)

    def _message(
        self, stop_reason: str | None, stop_sequence: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self._call.id,
            "type": "message",
            "role": "assistant",
            "model": self._call.model,
            "content": self._content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": usage,
        }


def _input(text: str) -> dict[str, Any]:
    """The arguments of a call as an object; what was cut off or is no JSON is left out, as clients do it."""
    try:
        value = jiter.from_json(text.encode(), allow_inf_nan=False, partial_mode=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _end_of(choice: Choice) -> tuple[str, str | None]:
    """Why the answer ended, and with which of the stop strings."""
    if choice.stopped_by is not None:
        return "stop_sequence", choice.stopped_by
    return _STOP_REASONS[choice.finish_reason or "stop"], None


def _usage(usage: Usage) -> dict[str, Any]:
    """As with Anthropic, tokens of the prompt that came from the cache are counted apart."""
    counts: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
    if usage.reasoning_tokens is not None:
        counts["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return counts


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), _encode({"type": kind, **fields}))
