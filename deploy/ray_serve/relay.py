"""One request on its way through the endpoint, which may need one replica after the other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from deploy.ray_serve.marked_stream import MarkedStream
from deploy.ray_serve.messages import ProxiedRequest, ReplicaLost, ResponseHead
from server.error_forms import in_form_of
from server.errors import EngineDeadError
from server.resume import RESUMABLE_HEADER

Answer = AsyncGenerator[ResponseHead | bytes | ReplicaLost, None]

_log = logging.getLogger("ray.serve")

_RESUMABLE = RESUMABLE_HEADER.encode()
_IDEMPOTENCY_KEY = b"idempotency-key"
_MAX_TRIES = 6
_FIRST_PAUSE_S = 0.1
# A replica that is busy for longer says so after its own patience; that is the client's to know.
_RETRY_BUSY_WITHIN_S = 5.0
_UNAVAILABLE = 503
_TOO_MANY = 429


class Relay:
    """Passes a response on, byte for byte.

    What is lost before it begins is asked again. A stream that can go on goes on at another replica; any
    other stream ends with an error event, and what is no stream breaks off.
    """

    def __init__(self, ask: Callable[[ProxiedRequest], Answer], request: ProxiedRequest, path: str) -> None:
        """
        Args:
            ask: what a replica answers; closing it ends the request there.
            path: in whose form errors are told.
        """
        self._ask = ask
        self._request = request
        self._path = path
        # A client that reads marks itself gets them.
        self._takes_marks = all(name != _RESUMABLE for name, _ in request.headers)
        self._asked = request
        if self._takes_marks:
            self._asked = replace(request, headers=(*request.headers, (_RESUMABLE, b"true")))
        self._began = time.monotonic()
        self._num_tries = 0
        self._head: ResponseHead | None = None  # that the client has
        self._stream: MarkedStream | None = None
        self._is_done = False

    async def items(self) -> AsyncGenerator[ResponseHead | bytes, None]:
        """The head of the response, then its bytes.

        Raises:
            EngineDeadError: no replica answered; or, behind the head, a response that is no stream breaks
                off.
        """
        while not self._is_done and self._can_try:
            if self._num_tries:
                await asyncio.sleep(_FIRST_PAUSE_S * 2 ** (self._num_tries - 1))
            self._num_tries += 1
            if self._stream is not None:
                self._asked = replace(
                    self._asked,
                    body=self._stream.resumed_body(self._request.body),
                    # It is not the request that the key stands for, in a daemon that may know the key.
                    headers=tuple(pair for pair in self._asked.headers if pair[0] != _IDEMPOTENCY_KEY),
                )
            async with aclosing(self._ask(self._asked)) as answer, aclosing(self._passed(answer)) as items:
                async for item in items:
                    yield item
        if self._is_done:
            return
        lost = EngineDeadError("the replicas that were asked are gone")
        if self._head is None or not _header(self._head, b"content-type").startswith(b"text/event-stream"):
            raise lost
        yield self._event(lost)

    @property
    def _can_try(self) -> bool:
        if self._head is not None and self._stream is None:
            return False  # nobody could go on with it
        return self._num_tries < _MAX_TRIES

    async def _passed(self, answer: Answer) -> AsyncGenerator[ResponseHead | bytes, None]:
        async for item in answer:
            if isinstance(item, bytes):
                if ready := item if self._stream is None else self._stream.feed(item):
                    yield ready
            elif isinstance(item, ReplicaLost) or self._should_ask_another(item):
                _log.warning("%s is asked again: replica %s %s", self._path, item.replica_id, _excuse(item))
                self._asked = replace(self._asked, avoided=self._asked.avoided | {item.replica_id})
                return
            elif self._head is None:
                self._head = item
                yield self._shown(item)
            elif item.status != 200:
                _log.error("%s cannot go on: replica %s %s", self._path, item.replica_id, _excuse(item))
                yield self._event(EngineDeadError("no replica goes on with the stream"))
                self._is_done = True
                return
        if self._stream is None:
            self._is_done = True
        elif not self._stream.is_cut_short:
            yield self._stream.finish()
            self._is_done = True

    def _should_ask_another(self, head: ResponseHead) -> bool:
        if not self._can_try:
            return False
        if self._head is not None:
            return head.status in (_UNAVAILABLE, _TOO_MANY)
        return head.status == _UNAVAILABLE and time.monotonic() - self._began < _RETRY_BUSY_WITHIN_S

    def _shown(self, head: ResponseHead) -> ResponseHead:
        if not self._takes_marks or not _header(head, _RESUMABLE):
            return head
        self._stream = MarkedStream()
        return replace(head, headers=tuple(pair for pair in head.headers if pair[0] != _RESUMABLE))

    def _event(self, error: EngineDeadError) -> bytes:
        return in_form_of(self._path, error, "").event()


def _excuse(item: ResponseHead | ReplicaLost) -> str:
    return "was lost" if isinstance(item, ReplicaLost) else f"answered {item.status}"


def _header(head: ResponseHead, name: bytes) -> bytes:
    return next((value for header, value in head.headers if header == name), b"")
