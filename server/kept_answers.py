"""Answers that are kept for who sends the same request again."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec
from starlette.types import Message

_MAX_ANSWERS = 10_000
_MAX_BYTES = 64 * 2**20
_MAX_ANSWER_BYTES = 4 * 2**20


@dataclass(slots=True, eq=False)
class KeptAnswer:
    """What a request with a key got.

    Attributes:
        digest: of the request's body.
        claim: tells it from what another API process has under the same key.
        start: its first message; None as long as there is none.
        is_complete: nothing comes any more, and the client has got it all.
        is_kept: ``body`` is all of it.
    """

    digest: bytes
    claim: str = field(default_factory=lambda: uuid.uuid4().hex)
    start: Message | None = None
    body: bytearray = field(default_factory=bytearray)
    is_complete: bool = False
    is_kept: bool = True

    def take(self, message: Message) -> None:
        """Notes a message that was sent."""
        if message["type"] == "http.response.start":
            self.start = message
            return
        body, is_last = message.get("body", b""), not message.get("more_body", False)
        if self.is_kept and len(self.body) + len(body) <= _MAX_ANSWER_BYTES:
            self.body += body
        else:
            self.is_kept, self.body = False, bytearray()
        if is_last and self.start is not None and self.start["status"] == 200:
            # A stream that failed ends with an error event; one that did not, with an empty message.
            self.is_complete = not (self._is_stream and body)

    @property
    def _is_stream(self) -> bool:
        assert self.start is not None
        return any(
            name == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in self.start["headers"]
        )


class KeptAnswers:
    """The newest 10,000 answers or 64 MiB of them, each for the name of the key that asked, in memory."""

    def __init__(self) -> None:
        self._answers: OrderedDict[tuple[str | None, str], KeptAnswer] = OrderedDict()
        self._num_bytes = 0

    def get(self, name: tuple[str | None, str]) -> KeptAnswer | None:
        return self._answers.get(name)

    def claim(self, name: tuple[str | None, str], digest: bytes) -> KeptAnswer:
        """A new answer, which is running until it is settled."""
        answer = self._answers[name] = KeptAnswer(digest)
        return answer

    def settle(self, name: tuple[str | None, str], answer: KeptAnswer) -> None:
        """It is complete, and kept, or has failed, and forgotten."""
        if not answer.is_complete:
            del self._answers[name]
            return
        self._num_bytes += len(answer.body)
        for oldest, other in list(self._answers.items()):
            if len(self._answers) <= _MAX_ANSWERS and self._num_bytes <= _MAX_BYTES:
                return
            if other.is_complete:
                self._num_bytes -= len(other.body)
                del self._answers[oldest]

    def told(self, asked: str) -> bytes:
        """For another API process (``question``): what is here; nothing if that is the asker's own."""
        scope, key, claim = msgspec.json.decode(asked, type=tuple[str | None, str, str])
        answer = self._answers.get((scope, key))
        if answer is None or answer.claim == claim:
            return b""
        headers = [] if answer.start is None else [tuple(header) for header in answer.start["headers"]]
        told = _Told(answer.digest, headers, bytes(answer.body), answer.is_complete, answer.is_kept)
        return msgspec.msgpack.encode(told)


class _Told(msgspec.Struct, array_like=True, frozen=True):
    """An answer on its way to another API process."""

    digest: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    is_complete: bool
    is_kept: bool


def question(name: tuple[str | None, str], claim: str) -> str:
    """For ``KeptAnswers.told`` of another API process; ``claim`` is that of one's own answer."""
    return msgspec.json.encode((*name, claim)).decode()


def answer_told(told: bytes) -> KeptAnswer:
    """What another API process has, from its answer to a ``question``."""
    found = msgspec.msgpack.decode(told, type=_Told)
    start = {"headers": found.headers}
    return KeptAnswer(found.digest, "", start, bytearray(found.body), found.is_complete, found.is_kept)
