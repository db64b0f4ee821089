"""Streams that can go on at another server, for a router whose server died.

A stream that was asked for with ``x-inflightd-resumable: true`` has, behind what each step said, a comment
with the tokens of that step. Clients pass over comments; a router takes them out and keeps them. What it
has kept it sends as the field ``resume`` of the same request to another server, whose answer is the rest of
the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from server.call import Call
from server.errors import InvalidRequestError
from server.protocol import Resume

# In requests it asks for marks; in responses it says that there are some.
RESUMABLE_HEADER = "x-inflightd-resumable"


class ResumeMarks:
    """Writes the marks of one stream, whose call has one choice.

    A mark stands behind all events that its tokens and those of earlier marks led to, so that whoever
    passes on what stands before a mark, and nothing behind it, can go on from there. The first mark has
    besides the tokens what the server chose: the id, the time and the seed.
    """

    def __init__(self, call: Call) -> None:
        self._first: dict[str, object] = {
            "id": call.id,
            "created": call.created,
            "seed": call.requests[0].params.seed,
        }
        self._token_ids: list[int] = []

    def add(self, token_ids: Sequence[int]) -> None:
        """Takes tokens whose events come before the next mark."""
        self._token_ids += token_ids

    def take(self, num_cached_tokens: int) -> bytes:
        """The mark for the tokens since the last one."""
        if self._first:
            self._first["cached_tokens"] = num_cached_tokens
        said = {**self._first, "token_ids": self._token_ids}
        self._first, self._token_ids = {}, []
        return b": resume " + msgspec.json.encode(said) + b"\n\n"


def can_resume(call: Call) -> bool:
    """Whether a stream can be marked: one choice, whose events depend on the new tokens only.

    Logprobs of text completions tell places in the text, an echoed prompt its own logprobs.
    """
    return call.is_stream and len(call.requests) == 1 and call.num_logprobs is None and not call.echo


def resumed(call: Call, resume: Resume, vocab_size: int) -> Call:
    """The call, whose answer goes on behind the tokens of ``resume``.

    Raises:
        InvalidRequestError: it cannot.
    """
    if not can_resume(call):
        raise InvalidRequestError(
            "'resume' needs 'stream' to be true, one choice, and neither 'logprobs' nor 'echo'.",
            param="resume",
            code="invalid_value",
        )
    request = call.requests[0]
    if len(resume.token_ids) >= request.params.max_tokens:
        raise InvalidRequestError(
            f"'resume.token_ids' leaves nothing to generate: the answer may have {request.params.max_tokens} "
            "tokens.",
            param="resume.token_ids",
            code="array_above_max_length",
        )
    for index, token_id in enumerate(resume.token_ids):
        if token_id >= vocab_size:
            raise InvalidRequestError(
                f"'resume.token_ids[{index}]' is no token of this model, which has {vocab_size}.",
                param=f"resume.token_ids[{index}]",
                code="integer_above_max_value",
            )
    request = replace(
        request,
        params=replace(request.params, seed=resume.seed),
        generated_token_ids=tuple(resume.token_ids),
    )
    return replace(
        call,
        id=resume.id,
        created=resume.created,
        requests=(request,),
        num_cached_tokens=resume.cached_tokens or 0,
    )


def cannot_go_on() -> InvalidRequestError:
    """The tokens of ``resume`` are none that this request can have led to."""
    return InvalidRequestError(
        "The answer cannot go on behind 'resume.token_ids': it ends there, or breaks its grammar.",
        param="resume.token_ids",
        code="invalid_value",
    )
