"""Answers of ``/v1/responses``, as OpenAI writes them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from server.answer import Usage
from server.choice import Choice
from server.errors import ApiError
from server.item_references import output_id
from server.logprobs import chat_logprobs
from server.parsing.deltas import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from server.responses_validation import ResponseCall
from server.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


class _OpenItem:
    """The item that the answer is writing at the moment.

    Attributes:
        item: as it is shown when it begins.
        delta, done: names of the events that add to it and that say all of it.
        field: what the text is called in ``done``.
        pieces: the text so far.
        logprobs: of the tokens so far, if they are wanted.
    """

    def __init__(self, item: dict[str, Any], delta: str, done: str, field: str, place: bytes) -> None:
        self.item = item
        self.done = done
        self.field = field
        self.pieces: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.before_delta = b'event: %s\ndata: {"type":"%s",%s,"delta":' % (
            delta.encode(),
            delta.encode(),
            place,
        )


class ResponsesForm:
    """A list of items: reasoning, messages, calls of functions. A stream tells each step of each of them.

    Attributes:
        has_begun: whether events have been told.
        response: the whole response, once there is no more to come.
    """

    def __init__(self, asked: ResponseCall, tokenizer: Tokenizer) -> None:
        self._settings = asked.settings
        self._call = asked.call
        self._tokenizer = tokenizer
        self._sequence_number = 0
        self._output: list[dict[str, Any]] = []
        self._open_item: _OpenItem | None = None
        self._is_cut = False
        self.has_begun = False
        self.response: dict[str, Any] | None = None

    def first(self, choice: Choice) -> bytes:
        self.has_begun = True
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def piece(self, choice: Choice, text: str) -> bytes:
        return self._written(choice.take_piece(text), choice)

    def last(self, choice: Choice) -> bytes:
        rest = self._written(choice.take_deltas(), choice)
        self._is_cut = choice.finish_reason == "length"
        opening = b"" if self._output or self._open_item else self._begin_message()
        return rest + opening + self._close()

    def end(self, usage: Usage) -> bytes:
        self._finish(usage)
        kind = "response.incomplete" if self._is_cut else "response.completed"
        return self._event(kind, response=self.response)

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        [choice] = choices
        self._written(choice.take_whole(), choice)
        self.last(choice)
        self._finish(usage)
        return _encode(self.response)

    def failed(self, error: ApiError) -> bytes:
        """The end of a stream that fails: what there is so far, and why there is no more."""
        self._is_cut = True
        closing = self._close()
        told = {"code": "server_error", "message": error.message}
        self.response = self._response("failed", error=told)
        return closing + self._event("response.failed", response=self.response)

    def waiting(self) -> None:
        """The response that is worked on in the background."""
        self.response = self._response("in_progress")

    def cancelled(self) -> None:
        """The response that is not wanted any more."""
        self.response = self._response("cancelled")

    def _finish(self, usage: Usage) -> None:
        self.response = self._response(
            "incomplete" if self._is_cut else "completed",
            completed_at=None if self._is_cut else int(time.time()),
            incomplete_details={"reason": "max_output_tokens"} if self._is_cut else None,
            usage=_usage(usage),
        )

    def _written(self, deltas: Sequence[Delta], choice: Choice) -> bytes:
        return b"".join([self._delta(delta, choice) for delta in deltas])

    def _delta(self, delta: Delta, choice: Choice) -> bytes:
        match delta:
            case ContentDelta(text=text):
                return self._text("message", text, self._logprobs(choice))
            case ReasoningDelta(text=text):
                return self._text("reasoning", text)
            case ToolCallStart():
                return self._close() + self._begin_call(delta)
            case ToolCallArguments(text=text):
                return self._text("function_call", text)
            case ToolCallEnd():
                return self._close()

    def _text(self, kind: str, text: str, logprobs: list[dict[str, Any]] | None = None) -> bytes:
        before = b""
        if self._open_item is None or self._open_item.item["type"] != kind:
            before = self._close() + (self._begin_message() if kind == "message" else self._begin_reasoning())
        item = self._open_item
        assert item is not None
        item.pieces.append(text)
        rest = b""
        if kind == "message":
            rest = b',"logprobs":[]'
            if logprobs:
                item.logprobs += logprobs
                rest = b',"logprobs":' + _encode(logprobs)
        self._sequence_number += 1
        number = b',"sequence_number":%d}\n\n' % (self._sequence_number - 1)
        return b"".join((before, item.before_delta, _encode(text), rest, number))

    def _new_id(self, kind: str) -> str:
        return output_id(kind, self._call.id, len(self._output))

    def _begin_message(self) -> bytes:
        item = {
            "id": self._new_id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return self._begin(item, "response.output_text", "text", part)

    def _begin_reasoning(self) -> bytes:
        item = {
            "id": self._new_id("rs"),
            "type": "reasoning",
            "status": "in_progress",
            "summary": [],
            "content": [],
        }
        return self._begin(item, "response.reasoning_text", "text", {"type": "reasoning_text", "text": ""})

    def _begin_call(self, start: ToolCallStart) -> bytes:
        item = {
            "id": self._new_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": start.id,
            "name": start.name,
            "arguments": "",
        }
        return self._begin(item, "response.function_call_arguments", "arguments", None)

    def _begin(self, item: dict[str, Any], events: str, field: str, part: dict[str, Any] | None) -> bytes:
        index = len(self._output)
        place: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        if part is not None:
            place["content_index"] = 0
        self._open_item = _OpenItem(item, f"{events}.delta", f"{events}.done", field, _encode(place)[1:-1])
        begun = self._event("response.output_item.added", output_index=index, item=item)
        if part is not None:
            begun += self._event("response.content_part.added", **place, part=part)
        return begun

    def _close(self) -> bytes:
        """Tells the whole of the item that was written, if one was."""
        opened, self._open_item = self._open_item, None
        if opened is None:
            return b""
        index, text = len(self._output), "".join(opened.pieces)
        item = {**opened.item, "status": "incomplete" if self._is_cut else "completed"}
        place: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        said: dict[str, Any] = {opened.field: text}
        part: dict[str, Any] | None = None
        match item["type"]:
            case "function_call":
                item["arguments"] = text
                said["name"] = item["name"]
            case "reasoning":
                part = {"type": "reasoning_text", "text": text}
            case _:
                part = {
                    "type": "output_text",
                    "text": text,
                    "annotations": [],
                    "logprobs": opened.logprobs,
                }
                said["logprobs"] = opened.logprobs
        if part is not None:
            place["content_index"] = 0
            item["content"] = [part]
        ended = self._event(opened.done, **place, **said)
        if part is not None:
            ended += self._event("response.content_part.done", **place, part=part)
        self._output.append(item)
        return ended + self._event("response.output_item.done", output_index=index, item=item)

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        return {
            "id": self._call.id,
            "object": "response",
            "created_at": self._call.created,
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "model": self._call.model,
            "output": list(self._output),
            "usage": None,
            **self._settings,
            **fields,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, **fields, "sequence_number": self._sequence_number}
        self._sequence_number += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), _encode(data))

    def _logprobs(self, choice: Choice) -> list[dict[str, Any]] | None:
        num_top = self._call.num_logprobs
        return None if num_top is None else chat_logprobs(choice.take_logprobs(), num_top, self._tokenizer)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
