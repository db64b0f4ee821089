"""What happens on a connection before the application sees a request, over plain sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import AsyncIterator, Iterator

import pytest

import server.guard
import server.http_protocol
from scheduler.hashing_executor import HashingExecutor
from scheduler.messages import EngineOutput, Request
from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import chat, serving
from tests.server.in_process_engine import HashingEngine, ScriptedEngine, tokens
from tests.server.test_guard import exchange
from tests.server.test_guard import post_head as _post
from tests.sizes import size


@pytest.fixture
async def port(tokenizer: Tokenizer) -> AsyncIterator[int]:
    async with serving(create_app(ServerConfig(), ScriptedEngine(tokens([1])), tokenizer)) as port:
        yield port


BODY = json.dumps(chat("x")).encode()
GET = b"GET /version HTTP/1.1\r\nHost: x\r\n"


async def _is_alive(port: int) -> bool:
    return (await exchange(port, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200


async def _until_closed(port: int, *parts: bytes, seconds: float = 5.0) -> bytes:
    """What the server answers until it closes the connection by itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
        return await asyncio.wait_for(reader.read(), seconds)
    finally:
        writer.transport.abort()


def _error(answer: bytes) -> tuple[int, dict[str, str | None]]:
    head, body = answer.split(b"\r\n\r\n", 1)
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"].startswith("req_")
    assert headers["x-content-type-options"] == "nosniff"
    assert int(headers["content-length"]) == len(body)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return int(status.split()[1]), error


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(_post("Content-Length: 3", "Transfer-Encoding: chunked") + b"0\r\n", 400, id="cl-te"),
        pytest.param(_post("Transfer-Encoding: chunked", "Content-Length: 3") + b"0\r\n", 400, id="te-cl"),
        pytest.param(_post("Content-Length: 3", "Content-Length: 4") + b"abc", 400, id="two-lengths"),
        pytest.param(_post("Content-Length: 3", "Content-Length: 3") + b"abc", 400, id="same-lengths"),
        pytest.param(_post("Content-Length: -1"), 400, id="negative-length"),
        pytest.param(_post("Content-Length : 3") + b"abc", 400, id="space-before-colon"),
        pytest.param(_post("Transfer-Encoding: gzip") + b"abc", 400, id="te-gzip"),
        pytest.param(_post("Transfer-Encoding: xchunked") + b"abc", 400, id="te-xchunked"),
        pytest.param(_post("Transfer-Encoding: chunked") + b"zz\r\n", 400, id="bad-chunk"),
        pytest.param(GET + b"A: b\r\n c\r\n\r\n", 400, id="obs-fold"),
        pytest.param(GET + b"A: b\x00c\r\n\r\n", 400, id="nul-in-header"),
        pytest.param(b"GET / HTTP/1.1\nHost: x\n\n", 400, id="bare-lf"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 400, id="no-host"),
        pytest.param(GET + b"Host: y\r\n\r\n", 400, id="two-hosts"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, id="h2-preface"),
        pytest.param(b"GET / HTTP/1.2\r\nHost: x\r\n\r\n", 400, id="unknown-version"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x07" * 500, 400, id="tls-hello"),
        pytest.param(b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", 400, id="bytes-in-uri"),
        pytest.param(b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", 405, id="connect"),
        pytest.param(b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, id="long-uri"),
        pytest.param(GET + b"A: b\r\n" * 101 + b"\r\n", 431, id="many-headers"),
        pytest.param(GET + b"A: " + b"b" * 70_000 + b"\r\n\r\n", 431, id="large-header"),
        pytest.param(GET + (b"A: " + b"b" * 2000 + b"\r\n") * 40 + b"\r\n", 431, id="large-head"),
        pytest.param(GET + b"A" * 600_000, 431, id="endless-name"),
        pytest.param(
            _post("Transfer-Encoding: chunked") + b"1\r\n{\r\n0\r\n" + b"A: b\r\n" * 200, 431, id="trailers"
        ),
    ],
)  # fmt: skip
async def test_what_is_refused_before_the_application(
    port: int, sent: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        seen, _ = _error(await _until_closed(port, sent))
        assert seen == status
        assert await _is_alive(port)
    assert "Traceback" not in caplog.text
    assert "Invalid HTTP" not in caplog.text  # nobody can fill the log


async def test_a_head_of_sixteen_megabytes_is_refused_at_its_beginning(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET + b"A: ")
    num_sent = 0

    async def flood() -> None:
        nonlocal num_sent
        for _ in range(256):
            writer.write(b"b" * 65536)
            await writer.drain()
            num_sent += 65536

    flooding = asyncio.create_task(flood())
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    flooding.cancel()
    writer.transport.abort()
    assert b" 431 " in answer
    assert num_sent < 8 * 2**20  # the rest of it sits in the buffers of the sockets


async def test_the_largest_heads_that_are_taken(port: int) -> None:
    many = b"".join(b"A%d: b\r\n" % i for i in range(99))
    assert (await exchange(port, GET + many + b"\r\n"))[0] == 200
    large = b"A: " + b"b" * 60_000 + b"\r\n"
    # A head begins behind the body of a request before it, in the same segment.
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = BODY.ljust(200_000)
    writer.write(_post(f"Content-Length: {len(body)}") + body + GET)
    assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    writer.write(large + b"\r\n")
    answer = await asyncio.wait_for(reader.readuntil(b'"version"'), 5)
    assert b"HTTP/1.1 200 " in answer
    writer.close()


@pytest.mark.parametrize("body", [b"", BODY], ids=["get", "post"])
@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
async def test_an_upgrade_is_not_taken_up_and_the_body_not_lost(
    port: int, protocol: str, body: bytes
) -> None:
    lines = (
        f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {protocol}\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    )
    if body:
        sent = _post(f"Content-Length: {len(body)}", *lines.split("\r\n")[:-1]) + body
        status, _, answer = await exchange(port, sent[:-10], sent[-10:])
        assert (status, answer["object"]) == (200, "chat.completion")
    else:
        assert (await exchange(port, GET + lines.encode() + b"\r\n"))[0] == 200


async def test_older_and_absolute_forms_of_http(port: int) -> None:
    assert b" 200 OK" in await _until_closed(port, b"GET /version HTTP/1.0\r\n\r\n")
    assert (await exchange(port, b"GET http://evil.example/version HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200
    for method in (b"TRACE", b"PROPFIND", b"PATCH"):
        status, headers, _ = await exchange(port, method + b" /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status == 405
        assert headers["allow"] == "get"


@pytest.mark.parametrize("kept", ["", "Connection: keep-alive\r\n"])
async def test_a_stream_of_http_1_0_has_no_chunks_and_ends_with_its_connection(port: int, kept: str) -> None:
    body = json.dumps(chat("x", stream=True)).encode()
    request = _post(f"Content-Length: {len(body)}", *kept.split("\r\n")[:-1]) + body
    request = request.replace(b"HTTP/1.1", b"HTTP/1.0")
    head, events = (await _until_closed(port, request)).split(b"\r\n\r\n", 1)
    assert b"transfer-encoding" not in head
    assert [line for line in head.split(b"\r\n") if b"connection" in line] == [b"connection: close"]
    assert events.startswith(b"data: {")
    assert events.endswith(b"}\n\ndata: [DONE]\n\n")


async def test_a_trailer_is_no_header(tokenizer: Tokenizer) -> None:
    config = ServerConfig(api_key=server.config.parse_api_keys("sk-1"))
    async with serving(create_app(config, ScriptedEngine(tokens([1])), tokenizer)) as port:
        head = _post("Transfer-Encoding: chunked")
        chunk = b"%x\r\n%s\r\n0\r\nAuthorization: Bearer sk-1\r\n\r\n" % (len(BODY), BODY)
        assert (await exchange(port, head + chunk))[0] == 401


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.http_protocol, "_HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(server.http_protocol, "_UNREAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(server.guard, "_BODY_TIMEOUT_S", 0.3)
    monkeypatch.setattr(server.guard, "_LINGER_S", 0.3)


async def _dripped(port: int, parts: list[bytes], every: float) -> bytes:
    """The answer to what comes so slowly, which must come before all is sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def answer() -> bytes:
        pieces = b""
        with contextlib.suppress(ConnectionResetError):  # of those who still send when patience has ended
            while piece := await reader.read(65536):
                pieces += piece
        return pieces

    answering = asyncio.create_task(answer())
    try:
        for part in parts:
            writer.write(part)
            await asyncio.wait((answering,), timeout=every)
            if answering.done():
                break
        else:
            pytest.fail("the server never lost its patience")
        return answering.result()
    finally:
        writer.transport.abort()


@pytest.mark.usefixtures("short_times")
async def test_slow_heads_are_timed_out_whatever_trickles_in(port: int) -> None:
    assert await _until_closed(port) == b""  # nothing asked, nothing said
    assert await _until_closed(port, b"\r\n\r\n") == b""
    assert _error(await _until_closed(port, b"GET /\r\n"))[0] == 408  # HTTP/0.9
    assert _error(await _dripped(port, [GET, *[b"A: b\r\n"] * 50], 0.05))[0] == 408
    # After an answer, the keep-alive timeout waits for the first byte, and then the head's for the rest.
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET + b"\r\n" + GET)
    assert (await asyncio.wait_for(reader.read(), 5)).count(b"HTTP/1.1 ") == 2
    writer.close()


async def test_slow_clients_do_not_slow_the_others(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.http_protocol, "_HEAD_TIMEOUT_S", 1.0)
    connections = []
    for _ in range(size(300, 5000)):
        connections.append(await asyncio.open_connection("127.0.0.1", port))
        connections[-1][1].write(b"GET / HT")
    loop = asyncio.get_running_loop()
    began = loop.time()
    while loop.time() < began + 0.2:
        asked = loop.time()
        assert (await exchange(port, _post(f"Content-Length: {len(BODY)}"), BODY))[0] == 200
        assert loop.time() - asked < 0.5
    answers = await asyncio.gather(*(asyncio.wait_for(reader.read(), 10) for reader, _ in connections))
    assert {_error(answer)[0] for answer in answers} == {408}
    for _, writer in connections:
        writer.close()


@pytest.mark.usefixtures("short_times")
async def test_slow_bodies_are_timed_out(port: int) -> None:
    for head in ("Content-Length: 1000", "Content-Length: 10\r\nExpect: 100-continue"):
        answer = (await _until_closed(port, _post(head))).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        status, error = _error(answer)
        assert (status, error["code"]) == (408, "request_timeout")
    head = _post("Content-Length: 1000")
    assert _error(await _dripped(port, [head, *[b" "] * 50], 0.05))[0] == 408


@pytest.mark.usefixtures("short_times")
async def test_a_body_that_comes_steadily_may_take_long(port: int) -> None:
    body = BODY.ljust(2500)  # at 1 KB/s it may take 2.5 s more
    parts = [body[start : start + 250] for start in range(0, 2500, 250)]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_post("Content-Length: 2500"))
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.06)
    assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    writer.close()


@pytest.mark.usefixtures("short_times")
async def test_nothing_gets_into_a_response_that_has_begun(tokenizer: Tokenizer) -> None:
    event = asyncio.Event()

    def script(request: Request) -> list[EngineOutput | asyncio.Event]:
        return [EngineOutput(request.request_id, (28,)), event]

    engine = ScriptedEngine(script)
    body = json.dumps(chat("x", stream=True)).encode()
    async with serving(create_app(ServerConfig(), engine, tokenizer)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_post(f"Content-Length: {len(body)}") + body)
        await asyncio.wait_for(reader.readuntil(b"\n\n"), 5)
        writer.write(b"\x00 is no HTTP\r\n\r\n")
        rest = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        assert b"HTTP/1.1" not in rest
        assert not rest.endswith(b"0\r\n\r\n")
        async with asyncio.timeout(2):
            while not engine.aborted:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest.mark.usefixtures("short_times")
async def test_an_answer_that_nobody_reads_is_dropped(tokenizer: Tokenizer) -> None:
    def endless(request: Request) -> Iterator[EngineOutput]:
        while True:
            yield EngineOutput(request.request_id, (28,) * 8192)

    engine = ScriptedEngine(endless)
    body = json.dumps(chat("x", stream=True)).encode()
    num_readers = size(1, 500)
    config = ServerConfig(max_queued_requests=num_readers)
    async with serving(create_app(config, engine, tokenizer)) as port:
        writers = []
        for _ in range(num_readers):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(_post(f"Content-Length: {len(body)}") + body)
            writers.append(writer)
        async with asyncio.timeout(10 + num_readers):
            while len(engine.aborted) < num_readers:
                await asyncio.sleep(0.02)
                assert await _is_alive(port)
        for writer in writers:
            writer.transport.abort()


async def test_a_storm_of_cancels_leaves_nothing_behind(tokenizer: Tokenizer) -> None:
    executor = HashingExecutor(num_blocks=400, block_size=4, vocab_size=49_152, max_num_seqs=16)
    engine = HashingEngine(executor)
    engine.pause = 0.001
    app = create_app(ServerConfig(max_queued_requests=100), engine, tokenizer)
    body = json.dumps(chat("x", stream=True, max_tokens=200, ignore_eos=True)).encode()
    chance = random.Random(7)

    async def leave_soon(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_post(f"Content-Length: {len(body)}") + body)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(), chance.uniform(0.0, 0.5))
        writer.transport.abort()

    async with serving(app) as port:
        for _ in range(size(1, 20)):
            await asyncio.gather(*(leave_soon(port) for _ in range(100)))
        async with asyncio.timeout(1):
            while engine.core.has_work or app.state.service.admission.num_waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert engine.stats.kv_cache_usage == 0
        engine.core.check_invariants()


async def test_verbs_of_other_servers_admins_do_not_exist(port: int) -> None:
    verbs = "pause sleep wake_up collective_rpc reset_prefix_cache flush_cache start_profile update_weights "
    for verb in (verbs + "v1/load_lora_adapter v1/unload_lora_adapter admin/drain").split():
        for method in ("GET", "POST"):
            head = f"{method} /{verb} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
            assert (await exchange(port, head))[0] == 404
