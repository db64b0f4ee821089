"""``Idempotency-Key``: a request that is sent again gets the answer of the first one."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api_keys import cache_scope
from server.errors import ConflictError, InvalidRequestError
from server.guard import SEND_BODY
from server.http_protocol import WRITE_CHUNK

if TYPE_CHECKING:
    from server.service import Service

_KEY = re.compile(rb"[!-~]{1,255}")
_MAX_ANSWERS = 10_000
_MAX_BYTES = 64 * 2**20
_MAX_ANSWER_BYTES = 4 * 2**20


@dataclass(slots=True, eq=False)
class _Answer:
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
    body: bytes = b""
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
            self.is_kept, self.body = False, b""
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
        self._answers: OrderedDict[tuple[str | None, str], _Answer] = OrderedDict()
        self._num_bytes = 0

    def get(self, name: tuple[str | None, str]) -> _Answer | None:
        return self._answers.get(name)

    def claim(self, name: tuple[str | None, str], digest: bytes) -> _Answer:
        """A new answer, which is running until it is settled."""
        answer = self._answers[name] = _Answer(digest)
        return answer

    def settle(self, name: tuple[str | None, str], answer: _Answer) -> None:
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

    def told(self, question: str) -> bytes:
        """For another API process (see ``_question``): what is here; nothing if that is the asker's own."""
        scope, key, claim = msgspec.json.decode(question, type=tuple[str | None, str, str])
        answer = self._answers.get((scope, key))
        if answer is None or answer.claim == claim:
            return b""
        headers = [] if answer.start is None else [tuple(header) for header in answer.start["headers"]]
        told = _Told(answer.digest, headers, answer.body, answer.is_complete, answer.is_kept)
        return msgspec.msgpack.encode(told)


class _Told(msgspec.Struct, array_like=True, frozen=True):
    """An answer on its way to another API process."""

    digest: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    is_complete: bool
    is_kept: bool


def _question(name: tuple[str | None, str], claim: str) -> str:
    return msgspec.json.encode((*name, claim)).decode()


class Idempotency:
    """Wraps an application, inside the guard. Only what is posted with the header comes to know of it.

    - The same key and body again: the same answer with ``idempotent-replayed: true``, or 409 while the first
      is running, or if its answer was over 4 MiB.
    - The same key with another body or path: 409.
    - Errors and streams that broke off are not kept: the next try is a new one.

    Of several API processes, each keeps what it has answered, and asks the others before it begins. Two that
    begin at the same moment both see the other, and both say 409.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = dict(scope["headers"]).get(b"idempotency-key") if scope["type"] == "http" else None
        if key is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if not _KEY.fullmatch(key):
            raise InvalidRequestError("The Idempotency-Key must be 1 to 255 printable ASCII characters.")
        body = await _whole_body(receive)
        if body is None:
            return
        digest = hashlib.sha256(scope["path"].encode() + b"\0" + body).digest()
        name = (cache_scope.get(), key.decode())
        answers = self._service.kept_answers
        known = answers.get(name)
        if known is not None:
            await _send_again(known, digest, send)
            return
        answer = answers.claim(name, digest)
        try:
            known = await self._elsewhere(_question(name, answer.claim))
            if known is None:
                await self._run(scope, body, receive, send, answer)
        finally:
            answers.settle(name, answer)
        if known is not None:
            await _send_again(known, digest, send)

    async def _elsewhere(self, question: str) -> _Answer | None:
        """What another API process has."""
        if self._service.peers.exist:
            for told in filter(None, await self._service.peers.ask("idempotency", question)):
                found = msgspec.msgpack.decode(told, type=_Told)
                start = {"headers": found.headers}
                return _Answer(found.digest, "", start, found.body, found.is_complete, found.is_kept)
        return None

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send, answer: _Answer) -> None:
        is_unread = True

        async def receive_again() -> Message:
            nonlocal is_unread
            if not is_unread:
                return await receive()
            is_unread = False
            return {"type": "http.request", "body": body, "more_body": False}

        def noting(inner: Send) -> Send:
            async def send_and_note(message: Message) -> None:
                await inner(message)
                answer.take(message)

            return send_and_note

        # What would write past ``send`` is taken out: nothing may pass unseen.
        noted = {name: value for name, value in scope.items() if name != WRITE_CHUNK}
        if SEND_BODY in scope:
            noted[SEND_BODY] = noting(scope[SEND_BODY])
        await self._app(noted, receive_again, noting(send))


async def _whole_body(receive: Receive) -> bytes | None:
    """None if the client has gone. The guard bounds its size and its time."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _send_again(known: _Answer, digest: bytes, send: Send) -> None:
    if known.digest != digest:
        raise ConflictError(
            "This Idempotency-Key was sent with another request. Take a new key for each request.",
            code="idempotency_key_reused",
        )
    if not known.is_complete:
        raise ConflictError(
            "The first request with this Idempotency-Key is still running.",
            code="idempotency_in_progress",
            headers={"retry-after": "1", "x-should-retry": "true"},
        )
    if not known.is_kept or known.start is None:
        raise ConflictError(
            "The request with this Idempotency-Key was answered; the answer was too long to be kept.",
            code="idempotency_answer_lost",
        )
    # Each wrapper on the way adds headers to the message's own list.
    headers = [
        (name, value)
        for name, value in known.start["headers"]
        if name not in (b"x-request-id", b"content-length")
    ]
    headers += [(b"content-length", b"%d" % len(known.body)), (b"idempotent-replayed", b"true")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": known.body, "more_body": False})
