"""The guard behind a real HTTP server, over plain sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import api, chat, serving
from tests.server.in_process_engine import ScriptedEngine, tokens
from tests.sizes import size

LIMIT = 100_000


@pytest.fixture
async def port(tokenizer: Tokenizer) -> AsyncIterator[int]:
    app = create_app(ServerConfig(max_body_bytes=LIMIT), ScriptedEngine(tokens([1])), tokenizer)
    async with serving(app) as port:
        yield port


async def exchange(port: int, *parts: bytes) -> tuple[int, dict[str, str], Any]:
    """Sends bytes, then reads one response: status, headers, parsed body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        status_line, *lines = head.decode().rstrip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers["content-length"]))
        return int(status_line.split()[1]), headers, json.loads(body)
    finally:
        writer.close()


def post_head(*lines: str, path: str = "/v1/chat/completions") -> bytes:
    fixed = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json"]
    return ("\r\n".join([*fixed, *lines]) + "\r\n\r\n").encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def test_a_body_that_says_it_is_too_long_is_not_read(port: int) -> None:
    status, headers, body = await exchange(port, post_head(f"Content-Length: {LIMIT + 1}"))
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert str(LIMIT) in body["error"]["message"]
    assert headers["connection"] == "close"
    assert headers["x-request-id"]


async def test_a_body_that_grows_too_long_is_refused_on_the_way(port: int) -> None:
    head = post_head("Transfer-Encoding: chunked")
    # No last chunk: the answer comes while the client is still sending.
    status, headers, body = await exchange(port, head, *[_chunk(b"x" * 10_000)] * 11)
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert headers["connection"] == "close"


async def test_a_body_of_exactly_the_limit_is_read(port: int) -> None:
    body = json.dumps(chat("x")).encode().ljust(LIMIT)
    assert (await exchange(port, post_head(f"Content-Length: {LIMIT}"), body))[0] == 200


async def test_chunks_of_a_byte(tokenizer: Tokenizer) -> None:
    num_chunks = size(50_000, 1_000_000)
    content = json.dumps(chat("x")).encode().ljust(num_chunks)
    chunk_of = [_chunk(bytes([byte])) for byte in range(256)]
    chunks = b"".join([chunk_of[byte] for byte in content]) + b"0\r\n\r\n"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with serving(create_app(ServerConfig(), ScriptedEngine(tokens([1])), tokenizer)) as port:
        status, _, _ = await exchange(port, post_head("Transfer-Encoding: chunked"), chunks)
    assert status == 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "9" * 30])
async def test_lengths_that_are_none(port: int, length: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post_head(f"Content-Length: {length}"))
    status_line = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    assert status_line.split()[1] in (b"400", b"413")


async def test_compressed_bodies_are_not_unpacked(port: int) -> None:
    for encoding in ("gzip", "br", "deflate, gzip"):
        head = post_head("Content-Length: 3", f"Content-Encoding: {encoding}")
        status, _, body = await exchange(port, head, b"abc")
        assert (status, body["error"]["code"]) == (415, "unsupported_media_type")


async def test_the_next_request_of_a_connection_works_after_an_error(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    good = json.dumps(chat("x")).encode()
    statuses = []
    for content in (b"{", good, b"[]", good):
        writer.write(post_head(f"Content-Length: {len(content)}") + content)
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode().lower()
        statuses.append(int(head.split()[1]))
        await reader.readexactly(int(re.findall(r"content-length: (\d+)", head)[0]))
    writer.close()
    assert statuses == [400, 200, 400, 200]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("abc-123", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("a b", False),
        ("a\tb", False),
        ("é", False),
        ("<script>", False),
    ],
)
async def test_request_ids(tokenizer: Tokenizer, sent: str, kept: bool) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        for path in ("/version", "/nowhere", "/v1/models/x"):
            response = await client.get(path, headers={b"x-request-id": sent.encode()})
            got = response.headers["x-request-id"]
            assert (got == sent) == kept
            assert kept or re.fullmatch(r"req_[0-9a-f]{32}", got)


async def test_a_fault_of_ours_tells_the_client_its_id_only(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(lambda request: [RuntimeError("secret /etc/passwd 0xdeadbeef")])
    async with api(engine, tokenizer) as client:
        for body in (chat(), chat(stream=True), chat(n=2), chat(n=2, stream=True)):
            with caplog.at_level(logging.ERROR):
                response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == 500
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert response.json()["error"]["type"] == "server_error"
            assert "secret" not in response.text
            assert "Traceback" not in response.text
            assert response.headers["x-request-id"] in caplog.text
            assert "secret" in caplog.text


async def test_wrong_paths_and_methods(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        for path in ("/v1", "/v1/chat", "/docs", "/v1/models/", "/%1b[31m%0d%0a"):
            response = await client.get(path)
            assert response.status_code == 404, path
            assert response.json()["error"]["type"] == "invalid_request_error"
            assert "\x1b" not in response.text
        for method, path in (
            ("GET", "/v1/chat/completions"),
            ("DELETE", "/v1/models"),
            ("PATCH", "/metrics"),
        ):
            response = await client.request(method, path)
            assert response.status_code == 405
            assert response.json()["error"]["code"] == "method_not_allowed"
            assert response.headers["allow"]
