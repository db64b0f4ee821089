"""Bytes that are almost an HTTP request."""

from __future__ import annotations

import json
import random

from tests.robustness.corpus import BODIES
from tests.robustness.json_mutations import changed_bytes, mutated

_METHODS = (
    "GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "CONNECT", "BREW", "get", "",
    "P OST",
)  # fmt: skip
_PATHS = (
    "/health", "/health/live", "/metrics", "/version", "/v1/models", "/v1/models/x/../y", "/", "//", "*",
    "", "http://x/version", "http://[::1/version", "/%00", "/%", "/%ff%fe", "/v1/responses/resp_x",
    "/a?b=c#d", "/?" + "q" * 300, "/\\x", "/\x01", "/" + "é", "/.." * 40, "/v1/chat/completions/",
    "/openapi.json", "/info",
)  # fmt: skip
_VERSIONS = (
    "HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.9", "HTTP/1.1 ", "http/1.1", "HTTP", "",
)  # fmt: skip
_HEADERS = (
    "Idempotency-Key: k", "Idempotency-Key:", "Idempotency-Key: \xe9", "X-Inflightd-Resumable: true",
    "Content-Length: 0", "Content-Length: 5", "Content-Length: -1", "Content-Length: 1e3",
    "Content-Length: 99999999999999999999", "Content-Length: 5, 5", "Content-Length:",
    "Content-Length : 3", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip",
    "Transfer-Encoding: chunked, identity", "Transfer-Encoding: \x0bchunked", "Content-Encoding: gzip",
    "Host: y", "Host:", "Expect: 100-continue", "Expect: x",
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x",
    "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    "Connection: close", "Connection: keep-alive", "Connection: \x00", "Content-Type: text/plain",
    "Content-Type: application/json; charset=utf-16", "Content-Type:", "Accept: */*",
    "Authorization: Bearer \xff", "Authorization:", "X-Request-Id: a b", "X-Request-Id: " + "r" * 200,
    "Origin: http://evil.example", "Access-Control-Request-Method: POST", "traceparent: 00-x",
    "A" * 300 + ": b", "A: " + "b" * 5000, ": empty", "no colon", " folded: x", "A: b\r\n c", "A: b\rc",
    "A: b\nB: c", "Cookie: " + "a=b; " * 100, "Trailer: A", "Range: bytes=0-",
)  # fmt: skip


def mutated_request(chance: random.Random) -> bytes:
    """A request, or two in a row, of which something may be wrong at every level."""
    data = _request(chance)
    if chance.random() < 0.1:
        data += _request(chance)
    if chance.random() < 0.3:
        data = changed_bytes(data, chance)
    if chance.random() < 0.02:
        data = chance.randbytes(chance.randrange(200)) + data
    return data


def _request(chance: random.Random) -> bytes:
    path, fields = chance.choice(BODIES)
    method, version = "POST", "HTTP/1.1"
    body = json.dumps(fields).encode() if chance.random() < 0.8 else mutated(fields, chance)
    if chance.random() < 0.25:
        method, path, body = chance.choice(_METHODS), chance.choice(_PATHS), b""
    if chance.random() < 0.05:
        version = chance.choice(_VERSIONS)
    headers = ["Host: x", "Content-Type: application/json"]
    if chance.random() < 0.2:  # in chunks, which may be wrong
        headers.append("Transfer-Encoding: chunked")
        size = chance.choice((1, 7, 100, 10_000))
        body = b"".join(_chunk(body[i : i + size], chance) for i in range(0, len(body), size)) + b"0\r\n\r\n"
    elif body or chance.random() < 0.3:
        length = len(body) + (chance.choice((-3, -1, 1, 50)) if chance.random() < 0.1 else 0)
        headers.append(f"Content-Length: {length}")
    for _ in range(chance.choice((0, 0, 0, 1, 1, 2, 4))):
        headers.insert(chance.randrange(len(headers) + 1), chance.choice(_HEADERS))
    if chance.random() < 0.05:
        del headers[chance.randrange(len(headers))]
    if chance.random() < 0.01:
        headers += [f"A{i}: b" for i in range(chance.choice((90, 120)))]
    newline = "\n" if chance.random() < 0.02 else "\r\n"
    head = newline.join((" ".join((method, path, version)), *headers, "", ""))
    return head.encode("utf-8") + body


def _chunk(data: bytes, chance: random.Random) -> bytes:
    size = b"%x" % len(data)
    if chance.random() < 0.03:
        size = chance.choice(
            (b"", b"-1", b"zz", b"0x5", b"fffffffffffffffff", size + b";a=b", b" " + size, b"0" * 40 + size)
        )
    return size + b"\r\n" + data + (b"\r\n" if chance.random() < 0.99 else b"")
