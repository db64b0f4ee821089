"""Answers of ``/v1/messages``, as Anthropic writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from server.answer import Usage
from server.call import Call
from server.choice import Choice
from server.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class AnthropicForm:
    """One message whose content is a list of blocks; a stream opens, fills and closes one after the other."""

    def __init__(self, call: Call, tokenizer: Tokenizer, system_fingerprint: str) -> None:
        self._call = call
        self._num_blocks = 0
        self._is_open = False
        self._before_text = b""
        self._end: tuple[str, str | None] = ("end_turn", None)

    def first(self, choice: Choice) -> bytes:
        num_prompt = len(self._call.requests[0].prompt_token_ids)
        usage = _usage(Usage(num_prompt, 0, choice.num_cached_tokens))
        return _event("message_start", message=self._message([], None, None, usage)) + _event("ping")

    def piece(self, choice: Choice, text: str) -> bytes:
        opening = b"" if self._is_open else self._open({"type": "text", "text": ""})
        return b"".join((opening, self._before_text, _encode(text), b"}}\n\n"))

    def last(self, choice: Choice) -> bytes:
        self._end = _end_of(choice)
        is_empty = not self._is_open and not self._num_blocks
        opening = self._open({"type": "text", "text": ""}) if is_empty else b""
        return opening + self._close()

    def end(self, usage: Usage) -> bytes:
        stop_reason, stop_sequence = self._end
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        return _event("message_delta", delta=delta, usage=_usage(usage)) + _event("message_stop")

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        [choice] = choices
        content = [{"type": "text", "text": choice.text}]
        return _encode(self._message(content, *_end_of(choice), _usage(usage)))

    def _open(self, block: dict[str, Any]) -> bytes:
        self._is_open = True
        self._before_text = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":'
            b'{"type":"text_delta","text":' % self._num_blocks
        )
        return _event("content_block_start", index=self._num_blocks, content_block=block)

    def _close(self) -> bytes:
        if not self._is_open:
            return b""
        self._is_open = False
        self._num_blocks += 1
        return _event("content_block_stop", index=self._num_blocks - 1)

    def _message(
        self,
        content: list[dict[str, Any]],
        stop_reason: str | None,
        stop_sequence: str | None,
        usage: dict[str, int],
    ) -> dict[str, Any]:
        return {
            "id": self._call.id,
            "type": "message",
            "role": "assistant",
            "model": self._call.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": usage,
        }


def _end_of(choice: Choice) -> tuple[str, str | None]:
    """Why the answer ended, and with which of the stop strings."""
    if choice.stopped_by is not None:
        return "stop_sequence", choice.stopped_by
    return _STOP_REASONS[choice.finish_reason or "stop"], None


def _usage(usage: Usage) -> dict[str, int]:
    """As with Anthropic, tokens of the prompt that came from the cache are counted apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), _encode({"type": kind, **fields}))
