"""Answers of ``/v1/chat/completions``, as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from server.answer import Usage
from server.call import Call
from server.choice import Choice
from server.logprobs import chat_logprobs
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
            self._head + b'{"index":%d,"delta":{"content":' % index for index in range(len(call.requests))
        ]
        self._after = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def first(self, choice: Choice) -> bytes:
        return (
            self._head
            + b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
            % choice.index
            + self._tail
        )

    def piece(self, choice: Choice, text: str) -> bytes:
        if self._call.num_logprobs is None:
            return self._before[choice.index] + _encode(text) + self._after
        return b"".join(
            (
                self._before[choice.index],
                _encode(text),
                b'},"logprobs":',
                self._logprobs(choice),
                b',"finish_reason":null}',
                self._tail,
            )
        )

    def last(self, choice: Choice) -> bytes:
        # Tokens without text, such as the stop token, may have left logprobs over.
        logprobs = b"null" if not choice.logprobs else self._logprobs(choice)
        return b"".join(
            (
                self._head,
                b'{"index":%d,"delta":{},"logprobs":' % choice.index,
                logprobs,
                b',"finish_reason":',
                _encode(choice.finish_reason),
                b"}",
                self._tail,
            )
        )

    def end(self, usage: Usage) -> bytes:
        if not self._call.include_usage:
            return DONE
        return self._head + b'],"usage":' + _encode(usage.as_json()) + b"}\n\n" + DONE

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        call = self._call
        has_logprobs = call.num_logprobs is not None
        return _encode(
            {
                "id": call.id,
                "object": "chat.completion",
                "created": call.created,
                "model": call.model,
                "choices": [
                    {
                        "index": choice.index,
                        "message": {"role": "assistant", "content": choice.text, "refusal": None},
                        "logprobs": msgspec.Raw(self._logprobs(choice)) if has_logprobs else None,
                        "finish_reason": choice.finish_reason,
                    }
                    for choice in choices
                ],
                "usage": usage.as_json(),
                "system_fingerprint": self._fingerprint,
            }
        )

    def _logprobs(self, choice: Choice) -> bytes:
        num_top = self._call.num_logprobs or 0
        content = chat_logprobs(choice.take_logprobs(), num_top, self._tokenizer)
        return _encode({"content": content, "refusal": None})
