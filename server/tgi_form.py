"""Answers and errors of Hugging Face TGI's ``/generate`` and its kin, as TGI writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from scheduler.messages import TokenLogprobs
from server.answer import Usage
from server.call import Call
from server.choice import Choice
from server.detokenizer import IncrementalDetokenizer
from server.errors import (
    ApiError,
    EngineDeadError,
    OverloadedError,
    QueueTimeoutError,
    ShuttingDownError,
    UnsupportedParameterError,
)
from server.protocol import GenerateParameters
from server.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode
# JSON has no minus infinity.
_LEAST = -9999.0


class TgiError(ApiError):
    """An error in TGI's form: ``{"error", "error_type"}``.

    What TGI refuses too has its status, 422. What TGI would do and this server does not is 400.
    """

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message, param=error.param, code=error.code, headers=error.headers)
        self.status = error.status
        if error.status == 400 and not isinstance(error, UnsupportedParameterError):
            self.status = 422
        self.type = "generation"
        if isinstance(error, (EngineDeadError, OverloadedError, QueueTimeoutError, ShuttingDownError)):
            self.type = "overloaded"
        elif error.status < 500:
            self.type = "validation"

    def body(self) -> bytes:
        return _encode({"error": self.message, "error_type": self.type})


class TgiForm:
    """Shows tokens one by one, with the text that each adds, control tokens by their names.

    A stream's last event has the whole text too; so the last token waits for it.
    """

    def __init__(
        self,
        call: Call,
        tokenizer: Tokenizer,
        inputs: str,
        parameters: GenerateParameters,
        *,
        as_list: bool,
    ) -> None:
        [request] = call.requests
        self._request = request
        self._tokenizer = tokenizer
        self._prefix = inputs if parameters.return_full_text else ""
        self._has_details = bool(parameters.details)
        self._has_prefill = bool(parameters.decoder_input_details)
        self._num_top = parameters.top_n_tokens or 0
        self._as_list = as_list
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, request.prompt_token_ids, skip_special_tokens=False
        )
        self._num_shown = 0
        self._last_token_id = request.prompt_token_ids[-1]

    def first(self, choice: Choice) -> bytes:
        return b""

    def piece(self, choice: Choice, text: str) -> bytes:
        if choice.finish_reason is not None:
            return b""
        return b"".join(map(self._event, self._shown(choice.take_logprobs())))

    def last(self, choice: Choice) -> bytes:
        shown = self._shown(choice.take_logprobs(), is_last=True)
        details = None
        if self._has_details:
            details = {**self._end(choice), "input_length": len(self._request.prompt_token_ids)}
        if not shown:  # only the rest of a broken character was left
            shown = [({"id": self._last_token_id, "text": "", "logprob": 0.0, "special": False}, [])]
        whole = {"generated_text": self._prefix + choice.text, "details": details}
        return b"".join(map(self._event, shown[:-1])) + self._event(shown[-1], whole)

    def end(self, usage: Usage) -> bytes:
        return b""  # the event with the whole text was the last

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        [choice] = choices
        answer: dict[str, Any] = {"generated_text": self._prefix + choice.text}
        if self._has_details:
            shown = self._shown(choice.take_logprobs(), is_last=True)
            answer["details"] = {
                **self._end(choice),
                "prefill": self._prefill(choice) if self._has_prefill else [],
                "tokens": [token for token, _ in shown],
            }
            if self._num_top:
                answer["details"]["top_tokens"] = [top for _, top in shown]
        return _encode([answer] if self._as_list else answer)

    def _event(
        self, shown: tuple[dict[str, Any], list[dict[str, Any]]], whole: dict[str, Any] | None = None
    ) -> bytes:
        token, top = shown
        self._num_shown += 1
        event: dict[str, Any] = {"index": self._num_shown, "token": token}
        if self._num_top:
            event["top_tokens"] = top
        return b"data:" + _encode(event | (whole or {"generated_text": None, "details": None})) + b"\n\n"

    def _shown(
        self, records: Iterable[TokenLogprobs], *, is_last: bool = False
    ) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """The tokens and, for each, the most likely ones in its place."""
        shown = []
        for record in records:
            self._last_token_id = record.token_id
            text = self._detokenizer.push((record.token_id,))
            top = [
                self._token(token_id, logprob, self._tokenizer.token_text(token_id))
                for token_id, logprob in record.top[: self._num_top]
            ]
            shown.append((self._token(record.token_id, record.logprob, text), top))
        if is_last and shown:
            shown[-1][0]["text"] += self._detokenizer.finish()
        return shown

    def _token(self, token_id: int, logprob: float, text: str) -> dict[str, Any]:
        return {
            "id": token_id,
            "text": text,
            "logprob": max(logprob, _LEAST),
            "special": token_id in self._tokenizer.special_token_ids,
        }

    def _prefill(self, choice: Choice) -> list[dict[str, Any]]:
        first = self._request.prompt_token_ids[0]
        tokens = [(first, None), *((r.token_id, max(r.logprob, _LEAST)) for r in choice.prompt_logprobs)]
        return [
            {"id": token_id, "text": self._tokenizer.token_text(token_id), "logprob": logprob}
            for token_id, logprob in tokens
        ]

    def _end(self, choice: Choice) -> dict[str, Any]:
        reason = "length"
        if choice.finish_reason == "stop":
            is_token = self._last_token_id in self._request.params.stop_token_ids
            reason = "eos_token" if is_token else "stop_sequence"
        is_sampled = self._request.params.temperature > 0
        return {
            "finish_reason": reason,
            "generated_tokens": choice.num_tokens,
            "seed": self._request.params.seed if is_sampled else None,
        }
