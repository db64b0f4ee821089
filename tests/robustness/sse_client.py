"""A client of streams that hides nothing: what came, in which order, and how the response ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


class CutError(Exception):
    """The connection ended in the middle of a response."""


def address_of(url: str) -> tuple[str, int]:
    """Host and port of ``http://host:port``."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def post(path: str, body: Mapping[str, Any]) -> bytes:
    """The bytes of a request on a connection of its own."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@dataclass(slots=True)
class Response:
    """A response whose head has come.

    Attributes:
        headers: names in lower case; the last of equal ones.
    """

    status: int
    headers: dict[str, str]
    _reader: asyncio.StreamReader

    async def events(self) -> AsyncIterator[str]:
        """The data of each server-sent event; ends with the response's last chunk.

        Raises:
            CutError: the connection ended before.
        """
        rest = b""
        async for chunk in self._chunks():
            *events, rest = (rest + chunk).split(b"\n\n")
            for event in events:
                for line in event.split(b"\n"):
                    if line.startswith(b"data: "):
                        yield line[6:].decode()
        if rest:
            raise CutError(f"the last event is not whole: {rest[:80]!r}")

    async def body(self) -> bytes:
        """The whole body. Raises CutError."""
        if "chunked" in self.headers.get("transfer-encoding", ""):
            return b"".join([chunk async for chunk in self._chunks()])
        try:
            return await self._reader.readexactly(int(self.headers["content-length"]))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise CutError(str(error)) from None

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readexactly(2)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise CutError(str(error)) from None


@asynccontextmanager
async def responding(url: str, request: bytes, seconds: float = 60.0) -> AsyncIterator[Response]:
    """Sends ``request`` and yields the response once its head is there; at last the connection is dropped.

    Raises:
        CutError: no connection, or one that ended without a head.
        TimeoutError: no head within ``seconds``.
    """
    try:
        reader, writer = await asyncio.open_connection(*address_of(url))
    except OSError as error:
        raise CutError(str(error)) from None
    try:
        try:
            writer.write(request)
            async with asyncio.timeout(seconds):
                head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise CutError(str(error)) from None
        status, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.split(":", 1) for line in lines if line)
        headers = {name.lower(): value.strip() for name, value in pairs}
        yield Response(int(status.split()[1]), headers, reader)
    finally:
        writer.transport.abort()
