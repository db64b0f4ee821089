"""Idle streams, and what happens if they are not idle."""

from __future__ import annotations

import asyncio

import pytest

from tests.benchmarks.front_end import hold_idle


@pytest.mark.parametrize("end", [None, EOFError()], ids=["streams", "their reader"])
async def test_idle_streams_are_not_awaited_for_ever(end: Exception | None) -> None:
    """They never wait if the streams before them end first: this measurement once hung there."""
    page = b"inflightd:num_requests_waiting 0\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(page), page))
        writer.close()
        await writer.wait_closed()

    streams_end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    if end is None:
        streams_end.set_result(None)
    else:
        streams_end.set_exception(end)
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        expected = (
            pytest.raises(TimeoutError, match="go on for longer") if end is None else pytest.raises(EOFError)
        )
        with expected:
            await asyncio.wait_for(hold_idle(port, 1, streams_end), 10)
