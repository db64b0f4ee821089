"""Answers of ``/v1/completions``, as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from server.answer import Usage, usage_so_far
from server.call import Call
from server.choice import Choice
from server.logprobs import CompletionLogprobs, joined, prompt_logprobs
from server.sse import DONE
from server.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


class CompletionForm:
    """The constant bytes of a chunk are made once a call; a token adds its text only."""

    def __init__(self, call: Call, tokenizer: Tokenizer, system_fingerprint: str) -> None:
        self._call = call
        self._identity = {
            "id": call.id,
            "object": "text_completion",
            "created": call.created,
            "model": call.model,
            "system_fingerprint": system_fingerprint,
        }
        self._head = b"data: " + _encode(self._identity)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if call.include_usage else b"]}\n\n"
        self._before = self._head + b'{"text":'
        self._after = [
            b',"index":%d,"logprobs":null,"finish_reason":null}' % index + self._tail
            for index in range(call.num_choices)
        ]
        self._has_details = call.num_logprobs is not None or call.shows_token_ids or call.has_running_usage
        self._tokenizer = tokenizer
        # Shown once, with the first chunk of a choice.
        self._prompt_ids = {index: call.prompt_of(index).token_ids for index in range(call.num_choices)}
        self._logprobs: list[CompletionLogprobs] = []
        if call.num_logprobs is not None:
            self._logprobs = [
                CompletionLogprobs(
                    call.num_logprobs,
                    tokenizer,
                    skip_special_tokens=call.skip_special_tokens,
                    by_id=call.names_tokens_by_id,
                )
                for _ in range(call.num_choices)
            ]

    def first(self, choice: Choice) -> bytes:
        if not self._call.echo:
            return b""
        logprobs = self._prompt_logprobs(choice) if self._logprobs else None
        return self._chunk(choice, self._prompt_text(choice), logprobs)

    def piece(self, choice: Choice, text: str) -> bytes:
        if not self._has_details:
            return self._before + _encode(text) + self._after[choice.index]
        return self._chunk(choice, text, self._generated_logprobs(choice) if self._logprobs else None)

    def last(self, choice: Choice) -> bytes:
        # Tokens without text, such as the stop token, may have left logprobs over.
        logprobs = self._generated_logprobs(choice) if self._logprobs and choice.logprobs else None
        return self._chunk(choice, "", logprobs, choice.finish_reason)

    def end(self, usage: Usage) -> bytes:
        if not self._call.include_usage:
            return DONE
        return self._head + b'],"usage":' + _encode(usage.as_json()) + b"}\n\n" + DONE

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        shown = []
        for choice in choices:
            text = "" if self._call.is_scoring else choice.text
            logprobs = None
            if self._call.echo:
                text = self._prompt_text(choice) + text
            if self._logprobs:
                if self._call.echo:
                    logprobs = self._prompt_logprobs(choice)
                generated = self._generated_logprobs(choice)
                logprobs = generated if logprobs is None else joined(logprobs, generated)
            whole = _choice(choice, text, logprobs, choice.finish_reason)
            if self._call.shows_token_ids:
                whole["token_ids"] = choice.take_token_ids()
                whole["prompt_token_ids"] = self._prompt_ids[choice.index]
            if (num_top := self._call.num_prompt_logprobs) is not None:
                records = choice.prompt_logprobs
                whole["prompt_logprobs"] = prompt_logprobs(records, num_top, self._tokenizer)
            shown.append(whole)
        return _encode({**self._identity, "choices": shown, "usage": usage.as_json()})

    def _chunk(
        self, choice: Choice, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None = None
    ) -> bytes:
        shown = _choice(choice, text, logprobs, finish_reason)
        if self._call.shows_token_ids:
            shown["token_ids"] = choice.take_token_ids()
            shown["prompt_token_ids"] = self._prompt_ids.pop(choice.index, None)
        tail = self._tail
        if self._call.has_running_usage:
            tail = b'],"usage":' + _encode(usage_so_far(self._call, choice).as_json()) + b"}\n\n"
        return self._head + _encode(shown) + tail

    def _prompt_text(self, choice: Choice) -> str:
        return self._call.prompt_of(choice.index).text or ""

    def _prompt_logprobs(self, choice: Choice) -> dict[str, Any]:
        token_ids = self._call.prompt_of(choice.index).token_ids
        return self._logprobs[choice.index].prompt(token_ids, choice.prompt_logprobs)

    def _generated_logprobs(self, choice: Choice) -> dict[str, Any]:
        return self._logprobs[choice.index].generated(choice.take_logprobs())


def _choice(
    choice: Choice, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
) -> dict[str, Any]:
    return {"text": text, "index": choice.index, "logprobs": logprobs, "finish_reason": finish_reason}
