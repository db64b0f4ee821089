"""Memory of streams that wait: opens many, holds them, and shows what each costs the API process.

    python -m tests.benchmarks.idle_connections [--connections 10000] [--seconds 20]

Each connection is a streamed chat that waits for its turn, behind one that runs all the time. After 15 s of
silence its response begins with a comment: that is awaited from each. At the end all are closed at once. The
client runs in a process of its own, so that each side needs one file a connection.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from server.config import ServerConfig
from server.open_files import raise_open_files
from tests.benchmarks.child_process import asked, child_process
from tests.benchmarks.front_end_client import post
from tests.benchmarks.front_end_server import Usage, serve_api
from tests.benchmarks.paced_engine import Pace

_COMMENT = b": keep-alive"
_KEEP_ALIVE_S = 15.0


class _Waiting(asyncio.Protocol):
    """A stream that waits for its turn."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.head = b""
        self.is_closed = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.head = (self.head + data)[:2048]

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True

    @property
    def is_held(self) -> bool:
        return self.head.startswith(b"HTTP/1.1 200 ") and _COMMENT in self.head and not self.is_closed


@dataclass(frozen=True)
class Held:
    """What became of the connections: how many have begun and are open, how long it took to open them all."""

    num_held: int
    seconds_to_open: float
    first_refusal: bytes


def hold(pipe: Connection, port: int, count: int, seconds: float) -> None:
    """Opens the connections, says what is ``Held`` after a while, and closes them when it is told to."""
    raise_open_files()
    uvloop.run(_hold(pipe, port, count, seconds))


async def _hold(pipe: Connection, port: int, count: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 4}
    request = post("/v1/chat/completions", body)
    began = time.perf_counter()
    waiting = []
    for _ in range(count):
        _, protocol = await loop.create_connection(lambda: _Waiting(request), "127.0.0.1", port)
        waiting.append(protocol)
    opened = time.perf_counter() - began
    deadline = time.monotonic() + _KEEP_ALIVE_S + seconds
    while not all(each.is_held for each in waiting) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    refused = [each.head for each in waiting if not each.is_held]
    pipe.send(Held(count - len(refused), opened, refused[0] if refused else b""))
    await loop.run_in_executor(None, asked, pipe)
    for each in waiting:
        each.transport.abort()
    await asyncio.sleep(0.1)


@dataclass(frozen=True)
class Figures:
    """What the API process used before the connections were there, while they were, and after."""

    held: Held
    before: Usage
    during: Usage
    after: Usage


def measure(count: int, seconds: float) -> Figures:
    """Opens ``count`` connections and waits until all have begun, or ``seconds`` longer than that takes."""
    config = ServerConfig(port=0, max_queued_requests=count + 10, queue_timeout=0, log_level="error")
    # One place, and one answer that takes it for ever.
    Pace((1000,), 2.0, 1, 2**16).to_environment()
    with child_process(serve_api, config) as api:
        port = api.recv()
        occupying = _occupy(port)
        before = _usage(api)
        with child_process(hold, port, count, seconds) as client:
            held: Held = client.recv()
            during = _usage(api)
        time.sleep(2.0)
        after = _usage(api)
        occupying.close()
    return Figures(held, before, during, after)


def _occupy(port: int) -> socket.socket:
    """The answer that takes the one place, after one that loads what only a first request loads."""
    for max_tokens in (2, 2**15):
        held = socket.create_connection(("127.0.0.1", port))
        body = {
            "messages": [{"role": "user", "content": "Hi"}],
            "stream": True,
            "max_tokens": max_tokens,
            "ignore_eos": True,
        }
        held.sendall(post("/v1/chat/completions", body))
        seen = b""
        while (b"[DONE]" if max_tokens == 2 else b'"finish_reason":null') not in seen:
            data = held.recv(65_536)
            if not data:
                raise ConnectionError(f"the server said {seen[:200]!r}")
            seen += data
    return held


def _usage(api: Connection) -> Usage:
    api.send("usage")
    usage: Usage = api.recv()
    return usage


def report(count: int, figures: Figures) -> str:
    held, before, during, after = figures.held, figures.before, figures.during, figures.after
    each = (during.rss_bytes - before.rss_bytes) / count
    lines = [
        f"connections asked for, held      {count}, {held.num_held}",
        f"opened in                        {held.seconds_to_open:.1f} s",
        f"memory of the API process before {before.rss_bytes / 2**20:.0f} MiB",
        f"                          during {during.rss_bytes / 2**20:.0f} MiB",
        f"                           after {after.rss_bytes / 2**20:.0f} MiB",
        f"each                             {each / 1024:.1f} KiB",
    ]
    if held.first_refusal:
        lines.append(f"the first that is not held       {held.first_refusal[:200]!r}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a stream that waits costs.")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="to wait for comments that are late")
    arguments = parser.parse_args()
    print(report(arguments.connections, measure(arguments.connections, arguments.seconds)))


if __name__ == "__main__":
    main()
