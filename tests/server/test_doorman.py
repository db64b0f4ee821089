"""What is answered from a request's head alone, over plain sockets: nothing behind the doorman is asked."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

import server.http_protocol
from scheduler.messages import Request
from server.admission import Admission
from server.api_keys import api_key, cache_scope
from server.config import ServerConfig
from server.cors import Cors
from server.doorman import Doorman
from server.http_protocol import HttpProtocol
from server.listening import listen
from tests.server.http_client import serving_at
from tests.server.in_process_engine import SPEC, ScriptedEngine, tokens

LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
# One runs, four more are in the engine, one waits.
SMALL = ServerConfig(max_queued_requests=1)
KEYS = replace(SMALL, api_key=(api_key("sk-a", "ann"), api_key("sk-b", "bob")))


class _Door:
    """A doorman in front of an application that only notes what it is asked."""

    def __init__(self, config: ServerConfig = SMALL) -> None:
        self.asked: list[str] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.engine = ScriptedEngine(tokens([1]), replace(SPEC, max_num_seqs=1))
        self.admission = Admission(config, self.engine)
        self.doorman = Doorman(self.engine, self.admission, config.api_keys, Cors(config.allowed_origins))
        self.uvicorn: uvicorn.Server | None = None
        self.port = 0

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(scope["path"])
        await self.may_answer.wait()
        headers = [(b"content-length", b"3")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"app", "more_body": False})

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """While there is no place."""
        with self.admission.admit([Request(f"r{i}", (1,)) for i in range(6)]):
            assert self.admission.num_waiting >= 1
            yield


@asynccontextmanager
async def door(config: ServerConfig = SMALL) -> AsyncIterator[_Door]:
    it = _Door(config)
    protocol = functools.partial(HttpProtocol, doorman=it.doorman)
    with listen(ServerConfig(port=0)) as listener:
        async with serving_at(listener, it.app, http=protocol, interface="asgi3") as it.uvicorn:  # type: ignore[arg-type]
            it.port = listener.getsockname()[1]
            yield it


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def answer(self, *, has_body: bool = True) -> tuple[int, dict[str, str], bytes]:
        head = (await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), 5)).decode()
        status, *lines = head.rstrip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = await self._reader.readexactly(int(headers["content-length"])) if has_body else b""
        return int(status.split()[1]), headers, body

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self._reader.read(), 5)


@asynccontextmanager
async def connected(it: _Door) -> AsyncIterator[_Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
    try:
        yield _Connection(reader, writer)
    finally:
        writer.transport.abort()


def post(*lines: str, path: str = "/v1/chat/completions") -> bytes:
    return ("\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *lines]) + "\r\n\r\n").encode()


async def test_a_refusal_waits_for_no_body_and_keeps_the_connection() -> None:
    async with door() as it, connected(it) as client:
        with it.full():
            client.send(post("Content-Length: 1000", "X-Request-Id: mine"))
            status, headers, body = await client.answer()  # nothing of the body is sent
            assert (status, json.loads(body)["error"]["code"]) == (429, "server_overloaded")
            assert headers["x-request-id"] == "mine"
            assert headers["x-ratelimit-remaining-requests"] == "0"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["content-type"] == "application/json"
            assert 1 <= int(headers["retry-after"]) <= 60
            assert "date" in headers
            assert "connection" not in headers
            assert it.admission.rejections["requests"] == 1
        for piece in (b"x" * 999, b"x" + LIVE):
            client.send(piece)
            await asyncio.sleep(0.01)
        assert (await client.answer())[0] == 200
        assert not it.asked
        client.send(post("Content-Length: 2") + b"{}")  # there is room again
        assert (await client.answer())[2] == b"app"
        assert it.asked == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        (["Content-Length: 300000"], b"x" * 300_000),
        (["Transfer-Encoding: chunked"], b"5\r\nhello\r\n0\r\n\r\n"),
        (["Content-Length: 5", "Expect: 100-continue"], b""),
        (["Content-Length: 5", "Connection: close"], b"hello"),
    ],
)
async def test_a_body_that_is_not_worth_reading_costs_the_connection(
    lines: list[str], body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.http_protocol, "_LINGER_S", 0.2)
    async with door() as it, connected(it) as client:
        with it.full():
            client.send(post(*lines) + body)
            status, headers, _ = await client.answer()
            assert (status, headers["connection"]) == (429, "close")
            assert await client.rest() == b""
        assert not it.asked


async def test_a_body_that_never_comes_holds_the_connection_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server.http_protocol, "_HEAD_TIMEOUT_S", 0.2)
    async with door() as it, connected(it) as client:
        with it.full():
            client.send(post("Content-Length: 5"))
            assert (await client.answer())[0] == 429
            assert await client.rest() == b""


async def test_nothing_comes_behind_a_reply_whose_body_is_no_http() -> None:
    async with door() as it, connected(it) as client:
        with it.full():
            client.send(post("Transfer-Encoding: chunked") + b"zz\r\n")
            assert (await client.answer())[0] == 429
            assert await client.rest() == b""


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("/v1/completions", lambda body: body["error"]["type"] == "requests"),
        ("/v1/completions?x=1", lambda body: body["error"]["type"] == "requests"),
        ("/v1/embeddings", lambda body: body["error"]["type"] == "requests"),
        ("/v1/responses", lambda body: body["error"]["type"] == "requests"),
        ("/v1/messages", lambda body: body["error"]["type"] == "rate_limit_error"),
        ("/generate", lambda body: body["error_type"] == "overloaded"),
        ("/generate_stream", lambda body: body["error_type"] == "overloaded"),
        ("/", lambda body: body["error_type"] == "overloaded"),
    ],
)
async def test_each_api_is_refused_in_its_own_words(path: str, read: Any) -> None:
    async with door() as it, connected(it) as client:
        with it.full():
            client.send(post("Content-Length: 0", path=path))
            status, _, body = await client.answer()
            assert status == 429
            assert read(json.loads(body))


async def test_what_needs_no_place_is_not_refused() -> None:
    async with door() as it, connected(it) as client:
        with it.full():
            for request in (
                b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
                b"GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n",
                post("Content-Length: 0", path="/tokenize"),
                post("Content-Length: 0", path="/v1/messages/count_tokens"),
                b"POST /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
                post("Content-Length: 0", "Idempotency-Key: answered before"),
            ):
                client.send(request)
                assert (await client.answer())[2] == b"app"


async def test_only_those_who_have_a_key_learn_that_the_line_is_full() -> None:
    async with door(KEYS) as it, connected(it) as client:
        with it.full():
            for lines, expected in (
                ([], b"app"),
                (["Authorization: Bearer sk-c"], b"app"),
                (["Authorization: Bearer sk-b"], b"{"),
                (["X-Api-Key: sk-a"], b"{"),
            ):
                client.send(post("Content-Length: 0", *lines))
                assert (await client.answer())[2].startswith(expected)
            client.send(LIVE)
            assert (await client.answer())[2] == b'{"status":"ok"}'


async def test_a_key_with_its_share_is_refused_and_the_other_is_not() -> None:
    async with (
        door(replace(KEYS, max_requests_per_key=1, max_queued_requests=9)) as it,
        connected(it) as client,
    ):
        cache_scope.set("ann")
        with it.admission.admit([Request("r", (1,))]):
            client.send(post("Content-Length: 0", "X-Api-Key: sk-a"))
            status, _, body = await client.answer()
            assert (status, json.loads(body)["error"]["code"]) == (429, "rate_limit_exceeded")
            client.send(post("Content-Length: 0", "X-Api-Key: sk-b"))
            assert (await client.answer())[2] == b"app"


async def test_without_an_engine_nobody_is_let_in() -> None:
    async with door() as it, connected(it) as client:
        it.engine.is_ready = False
        client.send(post("Content-Length: 5"))
        status, headers, body = await client.answer()
        assert (status, json.loads(body)["error"]["code"]) == (503, "engine_unavailable")
        assert headers["retry-after"] == "1"
        client.send(b"hello" + LIVE)
        assert (await client.answer())[0] == 200


async def test_pages_of_other_origins_can_read_a_refusal() -> None:
    async with door(replace(SMALL, allowed_origins=("https://chat.example",))) as it, connected(it) as client:
        with it.full():
            client.send(post("Content-Length: 0", "Origin: https://chat.example"))
            headers = (await client.answer())[1]
            assert headers["access-control-allow-origin"] == "https://chat.example"


async def test_health_is_asked_by_head_too_and_by_http_1_0() -> None:
    async with door() as it, connected(it) as client:
        client.send(LIVE.replace(b"GET", b"HEAD") + LIVE)
        status, headers, _ = await client.answer(has_body=False)
        assert (status, headers["content-length"]) == (200, "15")
        assert (await client.answer())[2] == b'{"status":"ok"}'
        client.send(b"GET /health/live HTTP/1.0\r\n\r\n")
        assert (await client.answer())[1]["connection"] == "close"
        assert await client.rest() == b""
        assert not it.asked


async def test_replies_come_in_the_order_of_the_requests() -> None:
    async with door() as it, connected(it) as client:
        it.may_answer.clear()
        client.send(LIVE + b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n" + LIVE + LIVE)
        assert (await client.answer())[2] == b'{"status":"ok"}'
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.answer(), 0.05)
        it.may_answer.set()
        assert [(await client.answer())[2] for _ in range(3)] == [b"app"] * 3
        client.send(LIVE)
        assert (await client.answer())[2] == b'{"status":"ok"}'


async def test_the_time_between_requests_does_not_end_the_next_one() -> None:
    async with door() as it:
        assert it.uvicorn is not None
        it.uvicorn.config.timeout_keep_alive = 1
        async with connected(it) as client:
            it.may_answer.clear()
            client.send(LIVE + b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            await client.answer()
            await asyncio.sleep(1.2)
            it.may_answer.set()
            assert (await client.answer())[2] == b"app"
            assert await client.rest() == b""  # and then it does


def test_refusals_beyond_ten_times_the_load_take_turns() -> None:
    now = 100.0
    engine = ScriptedEngine(tokens([1]), replace(SPEC, max_num_seqs=1))
    admission = Admission(SMALL, engine)
    doorman = Doorman(engine, admission, SMALL.api_keys, Cors(()), clock=lambda: now)

    def delay() -> float:
        reply = doorman.reply(b"POST", b"/v1/completions", [])
        assert reply is not None
        assert reply.status == 429
        return reply.delay

    with admission.admit([Request(f"r{i}", (1,)) for i in range(6)]):
        # Nothing has ended yet, so 200 a second, and four seconds' worth of it at once.
        assert [delay() for _ in range(801)] == [0.0] * 801
        assert [delay() for _ in range(3)] == pytest.approx([0.005, 0.010, 0.015], abs=1e-6)
        for _ in range(1500):
            last = delay()
        assert last == pytest.approx(5.0)  # not for ever
        now += 5.0
        assert delay() == pytest.approx(0.005, abs=1e-6)
        # At an end a millisecond it is 16,000 a second.
        now += 10.0
        admission._ends.extend(i / 1000 for i in range(64))
        assert [delay() for _ in range(64_001)] == [0.0] * 64_001
        assert delay() == pytest.approx(1 / 16_000, abs=1e-6)
        # What needs no place has no turn.
        live = doorman.reply(b"GET", b"/health/live", [])
        assert live is not None
        assert live.delay == 0.0


async def test_a_refusal_that_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doorman, "_delay", lambda self: 0.3)
    async with door() as it, connected(it) as client:
        with it.full():
            began = asyncio.get_running_loop().time()
            refused = post("Content-Length: 5", "X-Request-Id: mine") + b"hello"
            client.send(
                refused + LIVE + refused.replace(b"Content-Length", b"Connection: close\r\nContent-Length")
            )
            status, headers, body = await client.answer()
            assert 0.29 < asyncio.get_running_loop().time() - began < 2
            assert (status, json.loads(body)["error"]["code"]) == (429, "server_overloaded")
            assert headers["x-request-id"] == "mine"
            assert headers["retry-after-ms"]
            assert "connection" not in headers
            assert (await client.answer())[2] == b"app"  # what waits behind it is the application's
            assert (await client.answer())[2] == b"app"
            assert await client.rest() == b""
        async with connected(it) as other:  # a long body is not kept waiting
            with it.full():
                other.send(post("Content-Length: 300000"))
                assert (await asyncio.wait_for(other.answer(), 0.25))[1]["connection"] == "close"


async def test_replies_that_nobody_reads_do_not_pile_up() -> None:
    count = 20_000
    async with door() as it:
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port, limit=2**30)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(count // 100):
            writer.write(LIVE * 100)
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        assert it.uvicorn is not None
        (protocol,) = it.uvicorn.server_state.connections
        assert protocol.transport.get_write_buffer_size() < 2**20
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        num_replies, tail = 0, b""
        while num_replies < count:
            read = tail + await asyncio.wait_for(reader.read(2**20), 5)
            num_replies += read.count(b"HTTP/1.1 200")
            tail = read[-len(b"HTTP/1.1 20") :]
        writer.transport.abort()
