"""What a stream costs that waits. The benchmark ``idle_connections`` does it with 10,000."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from pathlib import Path

import pytest

import server.sse
from scheduler.messages import Request
from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import serving
from tests.server.in_process_engine import SPEC, ScriptedEngine

NUM_STREAMS = 500
BODY = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True}).encode()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def _opened(port: int, count: int) -> list[socket.socket]:
    """Streams that have begun with a comment."""
    loop = asyncio.get_running_loop()
    opened = []
    for _ in range(count):
        client = socket.socket()
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, REQUEST)
        opened.append(client)
    for client in opened:
        seen = b""
        while b": keep-alive" not in seen:
            data = await asyncio.wait_for(loop.sock_recv(client, 4096), 10)
            assert data
            seen += data
        assert seen.startswith(b"HTTP/1.1 200 ")
    return opened


async def test_streams_that_wait_are_all_held_and_small(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.sse, "_KEEP_ALIVE_S", 0.2)
    monkeypatch.setattr(server.sse, "_MIN_SLEEP_S", 0.2)
    never = asyncio.Event()

    def script(request: Request) -> list[asyncio.Event]:
        return [never]

    engine = ScriptedEngine(script, SPEC)
    config = ServerConfig(max_queued_requests=2 * NUM_STREAMS, queue_timeout=0)
    async with serving(create_app(config, engine, tokenizer)) as port:
        warm = await _opened(port, 50)
        before = _memory()
        held = await _opened(port, NUM_STREAMS)
        each = (_memory() - before) / NUM_STREAMS
        for client in (*warm, *held):
            client.close()
    assert each < 40 * 1024, f"{each / 1024:.1f} KiB each"
