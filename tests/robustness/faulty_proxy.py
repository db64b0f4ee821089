"""A TCP proxy in front of a server that plants a fault into each stream: what a checker has to notice."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tests.robustness.sse_client import responding

# From the data of a stream's events to those that the client gets; ``None`` cuts the connection there.
Fault = Callable[[list[str]], list[str | None]]


@asynccontextmanager
async def faulty_proxy(url: str, fault: Fault) -> AsyncIterator[str]:
    """Yields the URL of the proxy."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        assert length is not None
        request = head + await reader.readexactly(int(length[1]))
        async with responding(url, request) as response:
            events = [data async for data in response.events()]
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for data in fault(events):
            if data is None:
                await writer.drain()
                writer.transport.abort()
                return
            event = f"data: {data}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
        writer.write(b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
