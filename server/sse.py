"""A stream of Server-Sent Events that costs little a token and ends in a way the client can tell.

Ends are: the whole answer with ``[DONE]``; an error event and no ``[DONE]``; or a closed connection. A clean
end without ``[DONE]`` does not happen: OpenAI's client takes it for a whole answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from server.errors import ShuttingDownError
from server.guard import SEND_BODY, api_error, send_error
from server.http_protocol import WRITE_CHUNK

DONE = b"data: [DONE]\n\n"

_KEEP_ALIVE_S = 15.0
# Between two looks at a stream.
_MIN_SLEEP_S = 1.0
_KEEP_ALIVE = ServerSentEvent(comment="keep-alive", sep="\n").encode()
# No line breaks of SSE, but of ``str.splitlines``, by which clients cut streams that are not OpenAI's own
# (httpx' ``iter_lines``). Events are JSON, where such a letter can only be part of a string.
_LINE_SEPARATORS = {letter.encode(): b"\\u%04x" % ord(letter) for letter in "\u0085\u2028\u2029"}
# A reader that takes nothing for so long is gone, whatever its connection says.
_STALL_S = 30.0


def _cannot_write(chunk: bytes) -> bool:
    """In place of the server's own writer where the server is not ours."""
    return False


def _without_line_separators(chunk: bytes) -> bytes:
    for letter, escape in _LINE_SEPARATORS.items():
        chunk = chunk.replace(letter, escape)
    return chunk


class EventStream(EventSourceResponse):
    """Sends byte chunks, each one or more whole events, as they come.

    sse-starlette's response sets up a cancel scope around each chunk (4 us of CPU, measured) and ends streams
    as soon as uvicorn begins to shut down. This one sends plainly and lets answers finish:

    - The response begins with the first chunk, so that what fails before it is an HTTP error, or with the
      first keep-alive comment, after 15 s of silence.
    - Client gone: the generator is cancelled and closed at once.
    - Client reads nothing for 30 s: the same. Until then at most one chunk and the socket's buffer wait.
    - Cancelled from outside (shutdown's deadline): an error event.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], request_id: str) -> None:
        super().__init__(chunks, sep="\n", ping=int(_KEEP_ALIVE_S))
        del self.headers["connection"]  # whether it is kept is not the response's to say
        self._chunks = chunks
        self._request_id = request_id
        self._path = ""
        self._has_started = False
        self._last_sent = 0.0
        self._is_sending = False
        self._is_shutting_down = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        self._path = scope["path"]
        # In a task of its own each token resumes this file's frames, not the dozen of the routing above.
        send_body = scope.get(SEND_BODY, send)
        streaming = asyncio.create_task(self._stream(send, send_body, scope.get(WRITE_CHUNK, _cannot_write)))
        watching = asyncio.create_task(self._watch_client(receive, streaming))
        keeping = asyncio.create_task(self._keep_alive(send, streaming))
        try:
            await asyncio.wait((streaming,))
        except asyncio.CancelledError:
            self._is_shutting_down = True
            streaming.cancel()
            await asyncio.wait((streaming,))
        finally:
            watching.cancel()
            keeping.cancel()
        streaming.result()

    async def _stream(self, send: Send, send_body: Send, write: Callable[[bytes], bool]) -> None:
        try:
            await self._send_chunks(send, send_body, write)
        except asyncio.CancelledError:
            if self._is_shutting_down:
                await self._send_error(ShuttingDownError(), send)
        except Exception as error:
            await self._send_error(error, send)
        finally:
            # Cancelled while sending, the generator is still open.
            await self._chunks.aclose()

    async def _send_chunks(self, send: Send, send_body: Send, write: Callable[[bytes], bool]) -> None:
        now = asyncio.get_running_loop().time
        async for chunk in self._chunks:
            if not self._has_started:
                await self._start(send)
            if not chunk.isascii():
                chunk = _without_line_separators(chunk)
            if not write(chunk):
                self._is_sending = True
                await send_body({"type": "http.response.body", "body": chunk, "more_body": True})
                self._is_sending = False
            self._last_sent = now()
        if not self._has_started:
            await self._start(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        self._has_started = True
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    async def _send_error(self, error: Exception, send: Send) -> None:
        told = api_error(error, self._request_id, self._path)
        if not self._has_started:
            await send_error(told, send)
            return
        await send({"type": "http.response.body", "body": told.event(), "more_body": False})

    async def _watch_client(self, receive: Receive, streaming: asyncio.Task[None]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        streaming.cancel()

    async def _keep_alive(self, send: Send, streaming: asyncio.Task[None]) -> None:
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(max(self._last_sent + _KEEP_ALIVE_S - now(), _MIN_SLEEP_S))
            silence = now() - self._last_sent
            if self._is_sending and silence >= _STALL_S:
                streaming.cancel()
            elif not self._is_sending and silence >= _KEEP_ALIVE_S:
                try:
                    async with asyncio.timeout(_STALL_S):
                        if not self._has_started:
                            await self._start(send)
                        await send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})
                except TimeoutError:
                    streaming.cancel()
                self._last_sent = now()
