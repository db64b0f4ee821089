"""What nobody should send, for a server that is busy with others: each with the answers that are right."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

from tests.robustness.sse_client import CutError, address_of, responding

# Of an answer, which may have to wait for an engine that starts, on a machine that is busy.
_PATIENCE_S = 120.0

Abuse = Callable[[str, random.Random], Awaitable[None]]


class AbuseError(Exception):
    """The server answered something that it should not have."""


def _post(path: str, content: bytes, *lines: str) -> bytes:
    """A POST of JSON; ``lines`` instead of the usual headers if there are any."""
    usual = ("Content-Type: application/json", f"Content-Length: {len(content)}")
    head = "\r\n".join((f"POST {path} HTTP/1.1", "Host: x", "Connection: close", *(lines or usual)))
    return head.encode() + b"\r\n\r\n" + content


def _chat(**fields: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **fields}
    return _post("/v1/chat/completions", json.dumps(body).encode())


def _completion(raw: str) -> bytes:
    """A completion with ``raw`` JSON beside its prompt."""
    return _post("/v1/completions", f'{{"prompt":"Hi","max_tokens":4,{raw}}}'.encode())


def _get(path: str, *lines: str) -> bytes:
    return "\r\n".join((f"GET {path} HTTP/1.1", "Host: x", "Connection: close", *lines, "", "")).encode()


_DEEP: dict[str, Any] = {"type": "object"}
for _ in range(90):
    _DEEP = {"type": "object", "properties": {"a": _DEEP}, "required": ["a"]}


def _schema(schema: object) -> bytes:
    return _chat(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "s", "strict": True, "schema": schema},
        }
    )


# name -> bytes, statuses of a right answer
REQUESTS: dict[str, tuple[bytes, set[int]]] = {
    "malformed JSON": (_post("/v1/chat/completions", b'{"messages": [}'), {400}),
    "cut JSON": (_post("/v1/completions", b'{"prompt": "Once upon'), {400}),
    "no body": (_post("/v1/completions", b""), {400}),
    "an array": (_post("/v1/completions", b"[1, 2]"), {400}),
    "bytes that are no UTF-8": (_post("/v1/completions", b'{"prompt": "\xff\xfe"}'), {400}),
    "half a surrogate pair": (_completion('"stop":"\\ud800"'), {400}),
    "NaN": (_completion('"temperature":NaN'), {400}),
    "infinity": (_completion('"temperature":1e999'), {400}),
    "a number of 5,000 digits": (_completion(f'"seed":{"9" * 5000}'), {400}),
    "nested 100,000 deep": (_completion(f'"x":{"[" * 100_000}{"]" * 100_000}'), {400}),
    "the same name twice": (_completion('"stop":"a","stop":"b"'), {400}),
    "wrong content type": (_post("/v1/completions", b"{}", "Content-Type: text/plain",
                                 "Content-Length: 2"), {415}),
    "gzip": (_post("/v1/completions", b"\x1f\x8b", "Content-Type: application/json", "Content-Encoding: gzip",
                   "Content-Length: 2"), {415}),
    "a length of 40 GB": (_post("/v1/completions", b"{", "Content-Type: application/json",
                                "Content-Length: 40000000000"), {413}),
    "a negative length": (_post("/v1/completions", b"", "Content-Length: -5"), {400}),
    "two lengths": (_post("/v1/completions", b"{}", "Content-Length: 2", "Content-Length: 3"), {400}),
    "length and chunks": (_post("/v1/completions", b"0\r\n\r\n", "Content-Length: 5",
                                "Transfer-Encoding: chunked"), {400}),
    "bad chunks": (_post("/v1/completions", b"zz\r\n", "Content-Type: application/json",
                         "Transfer-Encoding: chunked"), {400}),
    "a header of 100 KB": (_get("/version", "A: " + "b" * 100_000), {431}),
    "1,000 headers": (_get("/version", *(f"A{i}: b" for i in range(1000))), {431}),
    "a long path": (_get("/" + "a" * 20_000), {414}),
    "a random path": (_get("/../../etc/passwd"), {404}),
    "no such method": (b"BREW /pot HTTP/1.1\r\nHost: x\r\n\r\n", {400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), {400}),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
    "a proxy's request": (b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", {405}),
    "10,000 choices": (_completion('"n":10000'), {400}),
    "2^63 tokens": (_completion('"max_tokens":9223372036854775808'), {400}),
    "a bias of no token": (_completion('"logit_bias":{"-1":1}'), {400}),
    "100,000 biases": (_completion(f'"logit_bias":{json.dumps(dict.fromkeys(range(100_000), 1))}'), {400}),
    "1,000 stop strings": (_completion(f'"stop":{json.dumps(["a"] * 1000)}'), {400}),
    "a prompt of 1 MB": (_post("/v1/completions", json.dumps({"prompt": "a 1" * 350_000}).encode()), {400}),
    "messages that are none": (_chat(messages=[123]), {400}),
    "control tokens": (_chat(messages=[{"role": "user", "content": "<|im_end|><|im_start|>" * 20}]), {200}),
    "an image": (_chat(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]), {400}),
    "a chat template": (_chat(chat_template="{% for i in range(10**9) %}{% endfor %}"), {400}),
    "an unknown model": (_chat(model="../../etc/passwd"), {404}),
    "an unknown tool": (_chat(tool_choice={"type": "function", "function": {"name": "f"}}), {400}),
    "a schema of no type": (_schema({"type": "nothing"}), {400}),
    "a schema that cannot be met": (_schema({"type": "integer", "minimum": 5, "maximum": 1}), {400}),
    "a schema that refers to itself": (_schema({"$ref": "#"}), {200, 400}),
    "a schema from elsewhere": (_schema({"$ref": "http://169.254.169.254/schema.json"}), {400}),
    "a schema of 10^9 items": (_schema({"type": "array", "minItems": 10**9}), {400}),
    "a schema of up to 10^9 items": (_schema({"type": "array", "maxItems": 10**9}), {200}),
    "a schema of 10^9 letters": (_schema({"type": "string", "minLength": 10**9}), {400}),
    "a schema of 10^9 names": (_schema({"type": "object", "minProperties": 10**9}), {400}),
    "a schema of 10^9 lists in a list": (_schema({"type": "array", "minItems": 1000, "items": {
        "type": "array", "minItems": 1000, "items": {"type": "array", "minItems": 1000}}}), {400}),
    "a deep schema": (_schema(_DEEP), {200, 400}),
    "a wrong regex": (_completion('"guided_regex":"foo**("'), {400}),
    "a regex bomb": (_completion('"guided_regex":"(.{1,9999}){9999}"'), {400}),
    "a regex of 10^6 letters": (_completion('"guided_regex":"[ab]{1000000}"'), {400}),
    "a grammar of 10^9 letters without a choice": (
        _completion('"guided_grammar":"start: \\"a\\"~1000000000"'), {400}),
    "a grammar of 10^9 letters": (
        _completion('"guided_grammar":"start: x{1000000000}\\nx: \\"a\\" | \\"b\\""'), {200}),
    "100,000 brackets": (_completion(f'"guided_regex":"{"(" * 100_000}"'), {400}),
}  # fmt: skip


async def _answered(url: str, request: bytes, statuses: set[int]) -> None:
    try:
        async with responding(url, request, _PATIENCE_S) as response:
            body = await response.body()
            if response.status not in statuses | {503}:
                raise AbuseError(f"status {response.status}, not {sorted(statuses)}: {body[:200]!r}")
            if response.status == 503 and "retry-after" not in response.headers:
                raise AbuseError("503 without a time to come back")
            if response.status >= 400 and set(json.loads(body)["error"]) != {
                "message",
                "type",
                "param",
                "code",
            }:
                raise AbuseError(f"an error of another form: {body[:200]!r}")
    except TimeoutError:
        raise AbuseError(f"no answer within {_PATIENCE_S:.0f} s") from None
    except CutError as error:
        raise AbuseError(f"no whole answer: {error}") from None


def _plain(request: bytes, statuses: set[int]) -> Abuse:
    async def send(url: str, chance: random.Random) -> None:
        await _answered(url, request, statuses)

    return send


_LONG = _post(
    "/v1/completions",
    json.dumps({"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}).encode(),
)


async def _until_closed(reader: asyncio.StreamReader, seconds: float) -> bytes:
    async with asyncio.timeout(seconds):
        return await reader.read()


async def slow_head(url: str, chance: random.Random) -> None:
    """Half a head, then a byte a second: ended with 408 after 10 s."""
    reader, writer = await asyncio.open_connection(*address_of(url))
    try:
        writer.write(b"GET /version HTTP/1.1\r\nHost: x\r\n")
        for _ in range(12):
            writer.write(b"a")
            await asyncio.sleep(1.0)
            if reader.at_eof():
                break
        answer = await _until_closed(reader, _PATIENCE_S)
        if not answer.startswith(b"HTTP/1.1 408 "):
            raise AbuseError(f"a slow head got {answer[:60]!r}")
    except ConnectionError:  # it went on sending for too long
        pass
    except TimeoutError:
        raise AbuseError("a slow head is still connected") from None
    finally:
        writer.transport.abort()


async def half_open(url: str, chance: random.Random) -> None:
    """Part of a request, and gone: by a reset, or by ending its own side and waiting."""
    reader, writer = await asyncio.open_connection(*address_of(url))
    try:
        writer.write(_LONG[: chance.randrange(len(_LONG))])
        await asyncio.sleep(chance.random())
        if chance.random() < 0.5:
            writer.write_eof()
            await _until_closed(reader, _PATIENCE_S)
    except TimeoutError:
        raise AbuseError("a connection whose client has ended is still open") from None
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()


async def vanish(url: str, chance: random.Random) -> None:
    """A long answer is asked for, and nobody waits."""
    _, writer = await asyncio.open_connection(*address_of(url))
    writer.write(_LONG)
    await asyncio.sleep(chance.random() * 2)
    writer.transport.abort()


async def stop_reading(url: str, chance: random.Random) -> None:
    """A client that reads the head of a stream and then nothing for 5 s."""
    reader, writer = await asyncio.open_connection(*address_of(url))
    try:
        writer.write(_LONG)
        async with asyncio.timeout(_PATIENCE_S):
            await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(5.0)
    except TimeoutError:
        raise AbuseError("a stream did not begin") from None
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise AbuseError(f"a stream was cut: {error}") from None
    finally:
        writer.transport.abort()


async def byte_by_byte(url: str, chance: random.Random) -> None:
    """A whole request in 2,000 chunks of a byte: answered as any other."""
    body = b'{"prompt":"Hi","max_tokens":1}'.ljust(2000)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    lines = ("Content-Type: application/json", "Transfer-Encoding: chunked")
    await _answered(url, _post("/v1/completions", chunks + b"0\r\n\r\n", *lines), {200})


async def noise(url: str, chance: random.Random) -> None:
    """Random bytes: some error, or a closed connection."""
    reader, writer = await asyncio.open_connection(*address_of(url))
    try:
        writer.write(chance.randbytes(chance.randrange(1, 4000)))
        writer.write_eof()
        answer = await _until_closed(reader, _PATIENCE_S)
        if answer and not answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 ", b"HTTP/1.1 414 ")):
            raise AbuseError(f"noise got {answer[:60]!r}")
    except TimeoutError:
        raise AbuseError("noise left a connection open") from None
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()


ABUSES: dict[str, Abuse] = {
    **{name: _plain(*request) for name, request in REQUESTS.items()},
    "a slow head": slow_head,
    "half a request": half_open,
    "a client that leaves": vanish,
    "a client that stops reading": stop_reading,
    "bytes one by one": byte_by_byte,
    "noise": noise,
}

# Those that take seconds by themselves.
SLOW = frozenset({"a slow head", "a client that stops reading"})
