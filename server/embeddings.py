"""OpenAI's ``/v1/embeddings``: texts as vectors, pooled from the hidden states of the served model."""

from __future__ import annotations

import base64
import math
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from scheduler.messages import ExecutorSpec
from server.answer import Usage
from server.call import Call
from server.choice import Choice
from server.errors import InvalidRequestError
from server.protocol import INT32_MAX, CompletionRequest, ModelFields, PromptInput
from server.validation import Validator


class EmbeddingsRequest(ModelFields):
    input: PromptInput
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    priority: Annotated[int, Field(ge=-INT32_MAX, le=INT32_MAX)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    user: str | None = None


async def embeddings_call(
    wire: EmbeddingsRequest, validator: Validator, spec: ExecutorSpec, pooling: Literal["mean", "last"]
) -> Call:
    """The call that a request asks for: each text is a prompt after which one token is generated and dropped.

    Raises:
        ApiError: the texts cannot be read, or this engine pools no hidden states.
    """
    arrival = time.monotonic()
    if not spec.embedding_size:
        raise InvalidRequestError(
            f"Embeddings are not supported on this device ({spec.device}); with --device cpu they are.",
            code="embeddings_not_supported",
        )
    if wire.dimensions is not None and wire.dimensions > spec.embedding_size:
        raise InvalidRequestError(
            f"Invalid 'dimensions': expected a number of at most {spec.embedding_size}, which the vectors of "
            f"this model have, but got {wire.dimensions}.",
            param="dimensions",
            code="integer_above_max_value",
        )
    completion = CompletionRequest(
        model=wire.model,
        prompt=wire.input,
        max_tokens=1,
        temperature=0.0,
        priority=wire.priority,
        cache_salt=wire.cache_salt,
    )
    call = await validator.completion_of(completion, arrival, prompt_name="input")
    requests = [
        replace(request, params=replace(request.params, pooling=pooling)) for request in call.requests
    ]
    return replace(call, requests=tuple(requests), is_scoring=True)


class EmbeddingsForm:
    """Vectors of length 1, of fewer numbers if that was asked for."""

    def __init__(self, wire: EmbeddingsRequest, call: Call) -> None:
        self._call = call
        self._dimensions = wire.dimensions
        self._is_base64 = wire.encoding_format == "base64"

    def first(self, choice: Choice) -> bytes:
        return b""

    def piece(self, choice: Choice, text: str) -> bytes:
        return b""

    def last(self, choice: Choice) -> bytes:
        return b""

    def end(self, usage: Usage) -> bytes:
        return b""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        data: list[dict[str, Any]] = [
            {"object": "embedding", "index": choice.index, "embedding": self._shown(choice.embedding)}
            for choice in choices
        ]
        counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        return msgspec.json.encode(
            {"object": "list", "data": data, "model": self._call.model, "usage": counts}
        )

    def _shown(self, vector: Sequence[float]) -> list[float] | str:
        vector = vector[: self._dimensions]
        length = math.hypot(*vector) or 1.0
        scaled = [number / length for number in vector]
        if not self._is_base64:
            return scaled
        return base64.b64encode(struct.pack(f"<{len(scaled)}f", *scaled)).decode()
