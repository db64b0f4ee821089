"""An HTTP client for load that spends almost no CPU while the clock runs.

It may share the machine's cores with the server it measures, so during a run it only stores what each read of
a socket returned and when. Chunked encoding, server-sent events and JSON are taken apart after the run; every
token still gets the time at which its bytes arrived.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import uvloop

LAST_CHUNK = b"\r\n0\r\n\r\n"  # with the end of the chunk before: a header may end in "0" as well
_MAX_ERROR_BYTES = 64 * 1024
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r\n", re.IGNORECASE)
# Where servers put more of an answer: the text itself, or the thoughts before it, by either name.
_TEXT_FIELDS = ("content", "reasoning_content", "reasoning")


class ResponseError(Exception):
    """A response that is no complete stream of tokens."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Attributes:
        path: before the paths of the API.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    path: str = ""
    api_key: str | None = None

    @staticmethod
    def of(url: str, api_key: str | None = None) -> Target:
        """From ``http://host:port`` or ``https://host/path``.

        Raises:
            ValueError: it is no such URL, or the key cannot be sent.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is not a URL such as http://127.0.0.1:8000")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("the API key has characters that a header cannot hold")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        return Target(parts.hostname, port, tls, parts.path.rstrip("/"), api_key)

    def request(self, path: str, body: dict[str, object]) -> bytes:
        """The bytes of a POST that closes its connection."""
        content = json.dumps(body).encode()
        host = f"[{self.host}]" if ":" in self.host else self.host
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"POST {self.path}{path} HTTP/1.1\r\nHost: {host}:{self.port}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + content


@dataclass(slots=True)
class Exchange:
    """One request as it went over the wire. Times are seconds of ``time.perf_counter()``."""

    start: float
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed completion.

    Attributes:
        start: when the request was sent.
        token_times: arrival of each event that carried text; a server may send two tokens in one event. If
            none did, that of the event that ended the answer: tokens may be half a letter, or not shown.
        num_prompt_tokens, num_output_tokens: from the ``usage`` that the server sent.
    """

    start: float
    token_times: tuple[float, ...]
    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """All exchanges of a load, the seconds it took, and the CPU seconds that the client used.

    Attributes:
        most_late: seconds by which a request was sent after its time, at most.
    """

    exchanges: list[Exchange]
    seconds: float
    client_cpu_seconds: float
    most_late: float


def run_load(
    target: Target,
    path: str,
    bodies: Sequence[dict[str, object]],
    *,
    concurrency: int,
    seconds_for_one: float,
    starts: Sequence[float] | None = None,
    on_end: Callable[[], None] = lambda: None,
) -> Run:
    """Posts ``bodies`` in order, each on a connection of its own.

    Args:
        concurrency: at once at most; the next request goes when one has ended (a closed loop).
        seconds_for_one: after which a request counts as failed.
        starts: no request goes before its time, in seconds from the beginning (an open loop).
        on_end: called after each request.
    """
    requests = [target.request(path, body) for body in bodies]
    gc.collect()
    gc.disable()
    try:
        return uvloop.run(_run(target, requests, concurrency, seconds_for_one, starts, on_end))
    finally:
        gc.enable()


async def _run(
    target: Target,
    requests: Sequence[bytes],
    concurrency: int,
    seconds_for_one: float,
    starts: Sequence[float] | None,
    on_end: Callable[[], None],
) -> Run:
    exchanges: list[Exchange] = []
    pending = iter(zip(requests, starts or [0.0] * len(requests), strict=True))
    begin, begin_cpu = time.perf_counter(), time.process_time()
    most_late = 0.0

    async def work() -> None:
        nonlocal most_late
        for request, due in pending:  # one iterator for all workers: the next free one takes the next request
            if starts is not None:
                await asyncio.sleep(begin + due - time.perf_counter())
                most_late = max(most_late, time.perf_counter() - begin - due)
            exchange = Exchange(time.perf_counter())
            exchanges.append(exchange)
            await post(target, request, exchange, seconds_for_one)
            on_end()

    await asyncio.gather(*(work() for _ in range(min(concurrency, len(requests)))))
    return Run(exchanges, time.perf_counter() - begin, time.process_time() - begin_cpu, most_late)


async def post(target: Target, request: bytes, exchange: Exchange, seconds: float) -> None:
    """Sends a request on a connection of its own; the exchange tells what came of it, or what went wrong.

    Args:
        seconds: after which it has failed.
    """
    try:
        async with asyncio.timeout(seconds):
            await _post(target, request, exchange)
    except (OSError, TimeoutError) as error:
        exchange.failure = str(error) or f"no end after {seconds:.0f} s"


async def _post(target: Target, request: bytes, exchange: Exchange) -> None:
    loop = asyncio.get_running_loop()
    finished = loop.create_future()
    transport, _ = await loop.create_connection(
        lambda: _Reader(exchange, finished), target.host, target.port, ssl=target.tls
    )
    try:
        transport.write(request)
        await finished
    finally:
        transport.close()


class _Reader(asyncio.Protocol):
    """Stores what arrives on one connection and says when the response is complete."""

    def __init__(self, exchange: Exchange, finished: asyncio.Future[None]) -> None:
        self._exchange = exchange
        self._finished = finished
        self._tail = b""
        self._is_error = False

    def data_received(self, data: bytes) -> None:
        reads = self._exchange.reads
        reads.append((time.perf_counter(), data))
        if self._is_error or (len(reads) == 1 and not data.startswith(b"HTTP/1.1 200 ")):
            self._is_error = True
            received = b"".join(part for _, part in reads)
            if _is_whole(received):
                self._finish(ConnectionError(_told_by(received)))
            return
        self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
        if self._tail == LAST_CHUNK:
            self._finish(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._is_error and error is None:
            error = ConnectionError(_told_by(b"".join(part for _, part in self._exchange.reads)))
        self._finish(error or ConnectionError("closed before the last chunk"))

    def _finish(self, error: Exception | None) -> None:
        if self._finished.done():
            return
        if error is None:
            self._finished.set_result(None)
        else:
            self._finished.set_exception(error)


def _is_whole(response: bytes) -> bool:
    """Whether an error has all come, as far as its head tells; otherwise it ends with the connection."""
    head, _, body = response.partition(b"\r\n\r\n")
    length = _CONTENT_LENGTH.search(head + b"\r\n")
    if length is not None:
        return len(body) >= int(length[1])
    return response.endswith(LAST_CHUNK) or len(response) > _MAX_ERROR_BYTES


def _told_by(response: bytes) -> str:
    """An error as one line: its status, and what its body says, if that can be read."""
    head, _, body = response.partition(b"\r\n\r\n")
    status = head.partition(b"\r\n")[0].decode(errors="replace")[:100]
    try:
        error = json.loads(body[body.index(b"{") : body.rindex(b"}") + 1])
        error = error.get("error", error)
        message = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError):
        message = body.decode(errors="replace")
    return f"{status}: {' '.join(message.split())[:300]}".removesuffix(": ")


def read_answer(exchange: Exchange) -> Answer:
    """Takes a stored exchange apart.

    Raises:
        ResponseError: the request failed, or what came is incomplete, of another API, or without usage.
    """
    if exchange.failure:
        raise ResponseError(exchange.failure)
    try:
        return _answer(exchange)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ResponseError(f"this is no stream of OpenAI's API: {type(error).__name__}: {error}") from None


def _answer(exchange: Exchange) -> Answer:
    times: list[float] = []
    texts: list[str] = []
    usage = None
    finish_reason = ""
    end = None
    last = ""
    for arrival, last in _events(exchange.reads):
        if last == "[DONE]":
            break
        event = json.loads(last)
        if event.get("error"):
            raise ResponseError(f"the stream ended with an error: {last[:300]}")
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = choice.get("text") or next(filter(None, map(delta.get, _TEXT_FIELDS)), None)
            if choice.get("finish_reason"):
                finish_reason, end = choice["finish_reason"], arrival
            if text:
                texts.append(text)
                times.append(arrival)
    if not times and end is not None:
        times.append(end)
    if last != "[DONE]" or usage is None or not times:
        raise ResponseError(
            f"incomplete stream: usage {usage}, {len(times)} texts, last event {last[:200]!r}"
        )
    return Answer(
        exchange.start,
        tuple(times),
        "".join(texts),
        finish_reason,
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )


def _events(reads: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """The data of each server-sent event, with the arrival of its last byte."""
    body = bytearray()
    arrivals: list[tuple[int, float]] = []  # (bytes of the body that had arrived, when)
    for arrival, content in _chunks(reads):
        body += content
        arrivals.append((len(body), arrival))
    position, index = 0, 0
    for line in bytes(body).splitlines(keepends=True):
        position += len(line)
        if line.startswith(b"data:"):
            while arrivals[index][0] < position:
                index += 1
            yield arrivals[index][1], line[5:].strip().decode()


def _chunks(reads: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Each HTTP chunk: when its last byte arrived, and its content."""
    stream = b"".join(data for _, data in reads)
    head_end = stream.index(b"\r\n\r\n") + 4
    if b"chunked" not in stream[:head_end].lower():
        raise ResponseError("the response is not in chunked encoding")
    position, received, index = head_end, len(reads[0][1]), 0
    while True:
        line_end = stream.index(b"\r\n", position)
        size = int(stream[position:line_end].split(b";")[0], 16)
        if size == 0:
            return
        start, position = line_end + 2, line_end + 2 + size + 2
        while received < start + size:
            index += 1
            received += len(reads[index][1])
        yield reads[index][0], stream[start : start + size]
