"""How streams begin, go silent and end, over plain sockets of a real HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import server.sse
from scheduler.messages import EngineOutput, FinishReason, Request
from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import chat, events, serving
from tests.server.in_process_engine import ScriptedEngine, tokens


def _app(engine: ScriptedEngine, tokenizer: Tokenizer) -> FastAPI:
    return create_app(ServerConfig(), engine, tokenizer)


async def _post(port: int, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    )
    await writer.drain()
    return reader, writer


async def _until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.005)


async def _body(reader: asyncio.StreamReader) -> bytes:
    """The rest of a chunked body, unchunked. Raises IncompleteReadError if the connection ends before it."""
    parts = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    return b"".join(parts)


def _waiting(*token_ids: int) -> tuple[ScriptedEngine, asyncio.Event]:
    """An engine that stops after some tokens until the event is set."""
    event = asyncio.Event()

    def script(request: Request) -> list[EngineOutput | asyncio.Event]:
        return [
            *(EngineOutput(request.request_id, (token_id,)) for token_id in token_ids),
            event,
            EngineOutput(request.request_id, (28,), finish_reason=FinishReason.LENGTH),
        ]

    return ScriptedEngine(script), event


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("token_ids", [(), (28, 28)], ids=["before-first-token", "midway"])
async def test_a_client_that_leaves_aborts_its_requests(
    tokenizer: Tokenizer, n: int, stream: bool, token_ids: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = _waiting(*token_ids)
    async with serving(_app(engine, tokenizer)) as port:
        _, writer = await _post(port, chat(n=n, stream=stream))
        await _until(lambda: len(engine.requests) == n)
        await asyncio.sleep(0.02)
        assert engine.aborted == []
        writer.close()
        await _until(lambda: len(engine.aborted) == n, seconds=1.0)
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)
    assert "Traceback" not in caplog.text


async def test_a_client_that_leaves_while_its_body_is_read(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(tokens([1]))
    async with serving(_app(engine, tokenizer)) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await asyncio.sleep(0.05)
    assert engine.requests == []
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("path", ["/v1/completions", "/generate_stream"])
async def test_an_event_is_one_line_for_clients_that_know_more_line_breaks_than_sse(
    tokenizer: Tokenizer, path: str
) -> None:
    text = "a\u2028\u2029 é\u0085b\x0c\x1c\x1e"
    engine = ScriptedEngine(tokens(*([each] for each in tokenizer.encode(text))))
    async with (
        serving(_app(engine, tokenizer)) as port,
        httpx.AsyncClient() as client,
        client.stream(
            "POST", f"http://127.0.0.1:{port}{path}", json={"prompt": "x", "inputs": "x", "stream": True}
        ) as response,
    ):
        lines = [line async for line in response.aiter_lines()]  # as ``str.splitlines`` cuts them
    sent = [json.loads(line[5:]) for line in lines if line.startswith("data:") and "[DONE]" not in line]
    if path == "/v1/completions":
        assert "".join(event["choices"][0]["text"] for event in sent) == text
    else:
        assert sent[-1]["generated_text"] == text
    assert any("é" in line for line in lines)


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.sse, "_KEEP_ALIVE_S", 0.1)
    monkeypatch.setattr(server.sse, "_STALL_S", 0.5)
    monkeypatch.setattr(server.sse, "_MIN_SLEEP_S", 0.02)


@pytest.mark.usefixtures("short_times")
async def test_silence_is_broken_by_comments(tokenizer: Tokenizer) -> None:
    engine, event = _waiting()
    async with serving(_app(engine, tokenizer)) as port:
        reader, writer = await _post(port, chat(stream=True))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.35)
        event.set()
        body = (await _body(reader)).decode()
        writer.close()
    comments = [line for line in body.split("\n\n") if line.startswith(":")]
    assert 2 <= len(comments) <= 6
    assert set(comments) == {": keep-alive"}
    assert events(body)[-1] == "[DONE]"


@pytest.mark.usefixtures("short_times")
async def test_a_reader_that_stops_is_given_up(tokenizer: Tokenizer) -> None:
    num_sent = 0

    def script(request: Request) -> Iterator[EngineOutput]:
        nonlocal num_sent
        while True:
            num_sent += 1
            yield EngineOutput(request.request_id, (28,) * 8192)

    engine = ScriptedEngine(script)
    async with serving(_app(engine, tokenizer)) as port:
        _, writer = await _post(port, chat(stream=True))
        await _until(lambda: engine.aborted, seconds=10)
        writer.transport.abort()
    # What was made but not taken is bounded by the buffers of the sockets.
    assert num_sent * 8192 < 32 * 2**20


async def test_the_engine_fails_before_the_first_token(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens(finish=FinishReason.ERROR))
    engine.script = tokens([], finish=FinishReason.ERROR)
    async with serving(_app(engine, tokenizer)) as port:
        for stream in (False, True):
            reader, writer = await _post(port, chat(stream=stream))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 500")
            writer.close()


async def test_the_engine_fails_in_the_middle_of_a_stream(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([28], [], finish=FinishReason.ERROR))
    async with serving(_app(engine, tokenizer)) as port:
        reader, writer = await _post(port, chat(stream=True))
        await reader.readuntil(b"\r\n\r\n")
        seen = events((await _body(reader)).decode())
        writer.close()
    assert seen[-2]["choices"][0]["delta"] == {"content": ","}
    assert set(seen[-1]) == {"error"}
    assert seen[-1]["error"]["type"] == "server_error"
    assert engine.aborted == []


async def test_an_engine_that_is_not_ready(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([1]))
    engine.is_ready = False
    async with serving(_app(engine, tokenizer)) as port:
        for stream in (False, True):
            reader, writer = await _post(port, chat(stream=stream))
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            assert head.startswith("HTTP/1.1 503")
            assert "retry-after: 1" in head
            body = await reader.readexactly(int(head.lower().split("content-length: ")[1].split("\r\n")[0]))
            assert json.loads(body)["error"]["code"] == "engine_unavailable"
            assert b"secret" not in body
            writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_what_runs_at_the_deadline_of_a_shutdown_ends_with_an_error(
    tokenizer: Tokenizer, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    import uvicorn

    engine, _ = _waiting(28)
    config = uvicorn.Config(
        _app(engine, tokenizer), host="127.0.0.1", port=0, lifespan="off", log_config=None, ws="none",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    uvicorn_server = uvicorn.Server(config)
    running = asyncio.create_task(uvicorn_server.serve())
    await _until(lambda: uvicorn_server.started)
    reader, writer = await _post(uvicorn_server.servers[0].sockets[0].getsockname()[1], chat(stream=stream))
    await _until(lambda: engine.requests)
    await asyncio.sleep(0.05)
    uvicorn_server.should_exit = True
    await asyncio.sleep(0.5)
    assert engine.aborted == []  # it had its chance
    await running
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    if stream:
        *_, last = events((await _body(reader)).decode())
        assert last["error"]["code"] == "shutting_down"
    else:
        assert head.startswith("HTTP/1.1 503")
        assert json.loads(await reader.read())["error"]["code"] == "shutting_down"
    assert len(engine.aborted) == 1
    assert "Traceback" not in caplog.text
    writer.close()


async def test_a_stream_that_is_running_may_finish_after_shutdown_began(tokenizer: Tokenizer) -> None:
    import uvicorn

    engine, event = _waiting(28)
    uvicorn_server = uvicorn.Server(
        uvicorn.Config(
            _app(engine, tokenizer), host="127.0.0.1", port=0, lifespan="off", log_config=None, ws="none"
        )
    )
    running = asyncio.create_task(uvicorn_server.serve())
    await _until(lambda: uvicorn_server.started)
    reader, writer = await _post(uvicorn_server.servers[0].sockets[0].getsockname()[1], chat(stream=True))
    await _until(lambda: engine.requests)
    uvicorn_server.should_exit = True
    await asyncio.sleep(0.8)
    event.set()
    await reader.readuntil(b"\r\n\r\n")
    assert events((await _body(reader)).decode())[-1] == "[DONE]"
    writer.close()
    with contextlib.suppress(asyncio.CancelledError):
        await running
