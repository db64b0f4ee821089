"""``Idempotency-Key``: a request that is sent again gets the answer of the first one."""

from __future__ import annotations

import hashlib
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api_keys import cache_scope
from server.errors import ConflictError, InvalidRequestError
from server.guard import SEND_BODY
from server.http_protocol import WRITE_CHUNK
from server.kept_answers import KeptAnswer, answer_told, question
from server.service import Service

_KEY = re.compile(rb"[!-~]{1,255}")


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
            known = await self._elsewhere(question(name, answer.claim))
            if known is None:
                await self._run(scope, body, receive, send, answer)
        finally:
            answers.settle(name, answer)
        if known is not None:
            await _send_again(known, digest, send)

    async def _elsewhere(self, asked: str) -> KeptAnswer | None:
        """What another API process has."""
        if self._service.peers.exist:
            for told in filter(None, await self._service.peers.ask("idempotency", asked)):
                return answer_told(told)
        return None

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send, answer: KeptAnswer) -> None:
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


async def _send_again(known: KeptAnswer, digest: bytes, send: Send) -> None:
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
    await send({"type": "http.response.body", "body": bytes(known.body), "more_body": False})
