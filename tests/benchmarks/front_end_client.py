"""The process of ``front_end`` that reads the streams: each token compared with what the engine sent."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import uvloop

_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"


class _Reader(asyncio.Protocol):
    """Sends one request and keeps what comes back, and when. Taken apart once the clock has stopped."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.arrivals: list[tuple[float, bytes]] = []
        loop = asyncio.get_running_loop()
        self.begun = loop.create_future()
        self.done = loop.create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.arrivals.append((time.perf_counter(), data))
        if not self.begun.done():
            self.begun.set_result(None)
        self._tail = (self._tail + data)[-len(_END) :]
        if self._tail == _END:
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        for future in (self.begun, self.done):
            if not future.done():
                future.set_exception(error or ConnectionError("the stream ended early"))
                future.exception()


@dataclass(frozen=True)
class Seen:
    """What the client saw.

    Attributes:
        num_pieces: events with text, of one token or of several that arrived together.
        num_wrong: streams whose text is not, letter by letter, what the engine sent.
        gaps: seconds between two arrivals of tokens in a stream, of all streams.
        times: when each gap ended (``time.perf_counter``, one clock for all processes).
    """

    num_bytes: int
    num_pieces: int
    num_wrong: int
    gaps: tuple[float, ...]
    times: tuple[float, ...]


def read_streams(answers: Connection, port: int, request: bytes, num_streams: int, text: str) -> None:
    """Opens all streams, says so, reads them to their ends and says what was ``Seen``."""
    answers.send(uvloop.run(_read_streams(answers, port, request, num_streams, text)))


async def _read_streams(answers: Connection, port: int, request: bytes, num_streams: int, text: str) -> Seen:
    loop = asyncio.get_running_loop()
    readers = []
    for _ in range(num_streams):
        _, reader = await loop.create_connection(lambda: _Reader(request), "127.0.0.1", port)
        readers.append(reader)
    await asyncio.gather(*(reader.begun for reader in readers))
    answers.send("begun")
    await asyncio.gather(*(reader.done for reader in readers))
    answers.send("done")
    num_bytes = num_pieces = num_wrong = 0
    gaps, times = [], []
    for reader in readers:
        with_text = [(at, data) for at, data in reader.arrivals if b'"content":"' in data]
        body = _dechunked(b"".join(data for _, data in reader.arrivals))
        pieces = [
            json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            for line in body.splitlines()
            if line.startswith(b"data: {")
        ]
        num_bytes += len(body)
        is_wrong = "".join(pieces) != text
        num_wrong += is_wrong
        num_pieces += len(pieces) - pieces.count("")
        gaps += [after[0] - before[0] for before, after in pairwise(with_text)]
        times += [at for at, _ in with_text[1:]]
    return Seen(num_bytes, num_pieces, num_wrong, tuple(gaps), tuple(times))


def _dechunked(response: bytes) -> bytes:
    """The body of a response in chunks."""
    _, _, rest = response.partition(b"\r\n\r\n")
    parts = []
    position = 0
    while True:
        end = rest.index(b"\r\n", position)
        length = int(rest[position:end], 16)
        if not length:
            return b"".join(parts)
        parts.append(rest[end + 2 : end + 2 + length])
        position = end + 2 + length + 2


def post(path: str, body: dict[str, Any]) -> bytes:
    """A request as bytes."""
    encoded = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(encoded), encoded)
