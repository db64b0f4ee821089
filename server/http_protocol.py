"""HTTP/1.1 on a connection: uvicorn's protocol, with bounds on what comes before the application.

The guard sees a request once its head is complete. What is wrong before that (no HTTP, a head that never ends
or never stops growing) is refused here, with the same error object, and the connection is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import httptools
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.doorman import Doorman, Reply
from server.errors import (
    ApiError,
    HeadersTooLargeError,
    InvalidRequestError,
    MethodNotAllowedError,
    RequestTimeoutError,
    UriTooLongError,
)
from server.guard import new_request_id, security_headers

_log = logging.getLogger(__name__)

_MAX_HEAD_BYTES = 64 * 1024
_MAX_HEADERS = 100
_MAX_URI_BYTES = 8 * 1024
# From the connection, or the first byte of a further request, to the end of the head.
_HEAD_TIMEOUT_S = 10.0
# How long a refused client may go on sending, so that it reads the answer before the connection is reset.
_LINGER_S = 2.0
# The rest of a body that nobody reads may be so long; otherwise the connection is closed.
_MAX_UNREAD_BYTES = 64 * 1024
# A client that takes nothing for so long is gone, as ``sse`` sees it too. The kernel knows for TCP only.
_UNREAD_TIMEOUT_S = 30.0


# Where a response finds its ``ChunkWriter`` in its scope.
WRITE_CHUNK = "inflightd.write_chunk"


class ChunkWriter:
    """Writes a piece of a response that has begun, without what ASGI's ``send`` costs: a token each."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def __call__(self, chunk: bytes) -> bool:
        """Whether it is written. If not, ``send`` must be asked: the reader is slow or gone, or it cannot be
        written as a chunk."""
        cycle = self._cycle
        if (
            cycle.flow.write_paused
            or cycle.disconnected
            or not cycle.chunked_encoding
            or cycle.response_complete
            or not chunk
        ):
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        return True


class _RefusedError(Exception):
    """Ends the parser's work on a connection; the parser wraps it."""


class HttpProtocol(HttpToolsProtocol):
    """One connection.

    - A head of more than 64 KiB or 100 headers is 431, with a URI over 8 KiB 414, after 10 s 408.
    - What is no HTTP, HTTP/1.1 without exactly one ``Host``, and ``CONNECT`` is 400 or 405.
    - HTTP/1.0 is answered without chunks.
    - An ``Upgrade`` is ignored, and the request answered as if it had not been offered.
    - A client that reads nothing for 30 s while something waits for it is dropped.
    - What the doorman answers is answered once its head is there. The connection is kept if the body that
      nobody reads is short.

    A connection whose response has begun is closed without a word, so that nothing gets into the response.
    """

    def __init__(self, *arguments: Any, doorman: Doorman | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._doorman = doorman
        # Whether the request is answered and the rest of its body to be dropped.
        self._is_dropping = False
        self._closes_after_reply = False
        self._refusal: ApiError | None = None
        self._is_refused = False
        self._is_in_head = False
        self._is_upgrading = False
        self._num_head_bytes = 0
        self._num_headers = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    # ---- the connection ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._cancel_timers()
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:  # let it run dry
            return
        self._unset_keepalive_if_required()
        was_in_head = self._is_in_head
        num_before = self._num_head_bytes
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse(
                self._refusal or InvalidRequestError("This is no valid HTTP request.", code="invalid_http")
            )
            return
        if self._is_in_head:
            # What the parser holds back until a header is complete counts too.
            if was_in_head and self._num_head_bytes == num_before:
                self._num_head_bytes += len(data)
            if self._num_head_bytes > _MAX_HEAD_BYTES:
                self._refuse(_head_too_large())
        elif self._head_timer is None and self.timeout_keep_alive_task is None and not self._is_answering:
            self._await_head()  # line breaks between requests

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser takes what follows for another protocol. It is the body.
            offset = int(upgrade.args[0])
            method = self.parser.get_method()
            version = self.parser.get_http_version().encode()
            lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
            lines += [
                b"%s: %s" % header for header in self.headers if header[0] not in (b"upgrade", b"connection")
            ]
            self.parser = httptools.HttpRequestParser(self)
            self._is_upgrading = False
            self.parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n")
            self.parser.feed_data(data[offset:])

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # ---- the parser's callbacks ----

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()  # set by a request before it in the same piece of data
        self._is_in_head = True
        self._num_head_bytes = self._num_headers = 0
        if self._head_timer is None:
            self._await_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > _MAX_URI_BYTES:
            self._stop(UriTooLongError(f"The URI is longer than {_MAX_URI_BYTES} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._num_head_bytes += len(name) + len(value) + 4
        if self._num_headers > _MAX_HEADERS or self._num_head_bytes > _MAX_HEAD_BYTES:
            self._stop(_head_too_large())
        if self._is_in_head:  # a trailer is no header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._stop(MethodNotAllowedError("This server is no proxy."))
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if num_hosts > 1 or (not num_hosts and self.parser.get_http_version() != "1.0"):
            self._stop(InvalidRequestError("The request needs one Host header.", code="invalid_http"))
        if self.parser.should_upgrade():
            self._is_upgrading = True
            return
        self._is_in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        # Behind a request that is being answered the reply has to wait, and before a reader that stops too.
        if self._doorman is not None and not self._is_answering and not self.flow.write_paused:
            reply = self._doorman.reply(method, self.url, self.headers)
            if reply is not None:
                if reply.delay and self._has_short_body:
                    self._send_later(reply)
                else:
                    self._send(reply, method)
                return
        if self.parser.get_http_version() == "1.0":
            self._answer_without_chunks()
        else:
            super().on_headers_complete()
        self.scope[WRITE_CHUNK] = ChunkWriter(self.cycle)  # type: ignore[literal-required]

    def _answer_without_chunks(self) -> None:
        """HTTP/1.0 knows none: a response whose length is not known beforehand ends with its connection."""
        app, cycle = self.app, self.cycle

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            has_length = True

            async def send_plainly(message: Message) -> None:
                nonlocal has_length
                if message["type"] == "http.response.start":
                    has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
                    if not has_length:
                        cycle.chunked_encoding = False
                elif not has_length:
                    cycle.expected_content_length = len(message.get("body", b""))
                await send(message)

            await app(scope, receive, send_plainly)

        self.app = answer
        try:
            super().on_headers_complete()
        finally:
            self.app = app
        cycle = self.cycle

    def on_body(self, body: bytes) -> None:
        if not self._is_dropping:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_dropping:
            self._is_dropping = False
            self._cancel_timers()
            if self._closes_after_reply:
                self.transport.close()
            else:
                self.on_response_complete()
        elif not self._is_upgrading:
            super().on_message_complete()

    # ---- replies of the doorman ----

    @property
    def _has_short_body(self) -> bool:
        """Whether the rest of the request is soon past, unread."""
        if self.expect_100_continue:  # such a client may send its body or not
            return False
        headers = dict(self.headers)
        length = headers.get(b"content-length", b"0")
        is_short = length.isdigit() and len(length) < 10 and int(length) <= _MAX_UNREAD_BYTES
        return is_short and b"transfer-encoding" not in headers

    def _send_later(self, reply: Reply) -> None:
        """As an application would, so that further requests of the connection wait and its end is noticed."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.sleep(reply.delay)
            headers = [(name.encode(), value.encode("latin-1")) for name, value in reply.headers.items()]
            headers.append((b"content-length", b"%d" % len(reply.body)))
            await send({"type": "http.response.start", "status": reply.status, "headers": headers})
            await send({"type": "http.response.body", "body": reply.body, "more_body": False})

        app, self.app = self.app, answer
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def _send(self, reply: Reply, method: bytes) -> None:
        closes = not (self._has_short_body and self.parser.should_keep_alive())
        self._closes_after_reply = closes
        headers = {**reply.headers, "content-length": str(len(reply.body))}
        headers |= {name.decode(): value.decode() for name, value in self.server_state.default_headers}
        if closes:
            headers["connection"] = "close"
        self.transport.write(_response(reply.status, headers, b"" if method == b"HEAD" else reply.body))
        self._is_dropping = True
        patience = _LINGER_S if closes else _HEAD_TIMEOUT_S
        self._head_timer = self.loop.call_later(patience, self.transport.close)

    # ---- refusals and timers ----

    def _stop(self, refusal: ApiError) -> None:
        self._refusal = refusal
        raise _RefusedError

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self._is_answering:  # the head of a further request may wait for the answer to this one
            self._await_head()
        elif self._is_in_head:
            self._refuse(RequestTimeoutError("The request's headers took too long."))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        self._is_refused = True
        self._cancel_timers()
        if self._is_dropping or (
            self._is_answering and (self.cycle.response_started or not self.cycle.more_body)
        ):
            self.transport.close()
            return
        if self._is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = error.body()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": new_request_id(),
            "connection": "close",
            **security_headers,
            **error.headers,
        }
        _log.debug("a connection is closed: %s", error.message)
        self.transport.write(_response(error.status, headers, body))
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self._head_timer = self.loop.call_later(_LINGER_S, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(_UNREAD_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _cancel_timers(self) -> None:
        for timer in (self._head_timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._unread_timer = None


def _response(status: int, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def _head_too_large() -> HeadersTooLargeError:
    return HeadersTooLargeError(
        f"The request's headers are over {_MAX_HEAD_BYTES} bytes, or more than {_MAX_HEADERS}."
    )
