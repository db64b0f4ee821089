"""Answers of ``/v1/chat/completions``, as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from server.answer import Usage, usage_so_far
from server.call import Call
from server.choice import Choice
from server.logprobs import chat_logprobs, prompt_logprobs
from server.parsing.deltas import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    collected,
)
from server.sse import DONE
from server.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


class ChatForm:
    """The constant bytes of a chunk are made once a call; a token adds its text only."""

    def __init__(self, call: Call, tokenizer: Tokenizer, system_fingerprint: str) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._fingerprint = system_fingerprint
        head = {
            "id": call.id,
            "object": "chat.completion.chunk",
            "created": call.created,
            "model": call.model,
            "system_fingerprint": system_fingerprint,
        }
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        # As OpenAI does: a stream that ends with its usage has a null usage in all other chunks.
        self._tail = b'],"usage":null}\n\n' if call.include_usage else b"]}\n\n"
        self._before = [
            self._head + b'{"index":%d,"delta":{"content":' % index for index in range(call.num_choices)
        ]
        self._after = b'},"logprobs":null,"finish_reason":null}' + self._tail
        self._has_details = call.num_logprobs is not None or call.shows_token_ids or call.has_running_usage

    def first(self, choice: Choice) -> bytes:
        prompt = self._call.prompt_of(choice.index).token_ids if self._call.shows_token_ids else None
        first = self._chunk(choice, {"role": "assistant", "content": ""}, is_bare=True, prompt=prompt)
        if echoed := self._call.prompts[0].text:
            first += self._chunk(choice, {"content": echoed}, is_bare=True)
        return first

    def piece(self, choice: Choice, text: str) -> bytes:
        if self._call.syntax is not None:
            return self._parsed(choice)
        if not self._has_details:
            return self._before[choice.index] + _encode(text) + self._after
        return self._chunk(choice, {"content": text})

    def last(self, choice: Choice) -> bytes:
        parsed = b"" if self._call.syntax is None else self._parsed(choice)
        return parsed + self._chunk(choice, {}, choice.finish_reason)

    def end(self, usage: Usage) -> bytes:
        if not self._call.include_usage:
            return DONE
        return self._head + b'],"usage":' + _encode(usage.as_json()) + b"}\n\n" + DONE

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        call = self._call
        answer: dict[str, Any] = {
            "id": call.id,
            "object": "chat.completion",
            "created": call.created,
            "model": call.model,
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage.as_json(),
            "system_fingerprint": self._fingerprint,
        }
        if call.shows_token_ids:
            answer["prompt_token_ids"] = call.prompts[0].token_ids
        if (num_top := call.num_prompt_logprobs) is not None:
            records = choices[0].prompt_logprobs
            answer["prompt_logprobs"] = prompt_logprobs(records, num_top, self._tokenizer)
        return _encode(answer)

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        has_logprobs = self._call.num_logprobs is not None
        shown: dict[str, Any] = {
            "index": choice.index,
            "message": self._echoed({"role": "assistant", **self._message(choice)}),
            "logprobs": msgspec.Raw(self._logprobs(choice)) if has_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        if self._call.shows_token_ids:
            shown["token_ids"] = choice.take_token_ids()
        return shown

    def _parsed(self, choice: Choice) -> bytes:
        """A chunk for each delta; the first has what belongs to all tokens since the last chunk."""
        shown = [_shown(delta) for delta in choice.take_deltas()]
        return b"".join([self._chunk(choice, delta) for delta in shown if delta is not None])

    def _chunk(
        self,
        choice: Choice,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        *,
        is_bare: bool = False,
        prompt: tuple[int, ...] | None = None,
    ) -> bytes:
        """A chunk with what belongs to the tokens since the last one, unless it ``is_bare``."""
        # Tokens without text, such as the stop token, have logprobs and ids too.
        has_logprobs = self._call.num_logprobs is not None and bool(choice.logprobs) and not is_bare
        shown: dict[str, Any] = {
            "index": choice.index,
            "delta": delta,
            "logprobs": msgspec.Raw(self._logprobs(choice)) if has_logprobs else None,
            "finish_reason": finish_reason,
        }
        if self._call.shows_token_ids:
            shown["token_ids"] = None if is_bare else choice.take_token_ids()
        tail = self._tail
        if self._call.has_running_usage:
            tail = b'],"usage":' + _encode(usage_so_far(self._call, choice).as_json()) + b"}\n\n"
        if prompt is not None:
            tail = b'],"prompt_token_ids":' + _encode(prompt) + tail[1:]
        return self._head + _encode(shown) + tail

    def _echoed(self, message: dict[str, Any]) -> dict[str, Any]:
        if echoed := self._call.prompts[0].text:
            message["content"] = echoed + (message["content"] or "")
        return message

    def _message(self, choice: Choice) -> dict[str, Any]:
        syntax = self._call.syntax
        if syntax is None:
            return {"content": choice.text, "refusal": None}
        parsed = collected(choice.take_deltas())
        content = parsed.content
        if content is None and parsed.reasoning is None and not parsed.tool_calls:
            content = ""
        message: dict[str, Any] = {"content": content, "refusal": None}
        if syntax.reasoning is not None:
            message |= _reasoning(parsed.reasoning)
        if parsed.tool_calls:
            message["tool_calls"] = [
                {
                    "id": each.id,
                    "type": "function",
                    "function": {"name": each.name, "arguments": each.arguments},
                }
                for each in parsed.tool_calls
            ]
        return message

    def _logprobs(self, choice: Choice) -> bytes:
        num_top = self._call.num_logprobs or 0
        by_id = self._call.names_tokens_by_id
        content = chat_logprobs(choice.take_logprobs(), num_top, self._tokenizer, by_id=by_id)
        return _encode({"content": content, "refusal": None})


def _shown(delta: Delta) -> dict[str, Any] | None:
    """A delta in OpenAI's form; None if there is nothing to show."""
    match delta:
        case ContentDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return _reasoning(text)
        case ToolCallStart(index, name, call_id):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case ToolCallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case ToolCallEnd():
            return None


def _reasoning(text: str | None) -> dict[str, Any]:
    """Under vLLM's old name, which most clients read, and its new one."""
    return {"reasoning_content": text, "reasoning": text}
