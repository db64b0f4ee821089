"""What a streamed token costs the API process: CPU time a token, over real sockets, with the engine faked.

    python -m tests.benchmarks.stream_cost [--streams 256] [--tokens-per-second 100] [--seconds 10]

The engine is a timer in the API process that hands one token to every stream at each tick; what it costs by
itself (making the outputs and waking the streams) is measured without HTTP and shown beside. The client is a
process of its own that only counts bytes and events.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import uvicorn
import uvloop

from scheduler.messages import EngineOutput, EngineStats, ExecutorSpec, FinishReason, Request
from server.app import create_app
from server.config import ServerConfig
from server.histogram import STEP_TOKENS_BUCKETS, Histogram
from server.model_source import fetch_default_model
from server.tokenizer import load_tokenizer

_TEXT = " The quick brown fox jumps over the lazy dog, and then it does so again."


class TickingEngine:
    """Gives every request one token at each tick."""

    def __init__(self, token_ids: list[int], interval: float) -> None:
        self.spec = ExecutorSpec("ticking", 49_152, 16, 100_000, 8192, 1024, 8192, "none")
        self.stats = EngineStats()
        self.step_tokens = Histogram(STEP_TOKENS_BUCKETS)
        self.is_ready = True
        self.num_restarts = 0
        self.num_tokens = 0
        self.lags: list[float] = []
        self._token_ids = token_ids
        self._interval = interval
        self.streams: dict[str, tuple[Request, list[EngineOutput], asyncio.Event, list[int]]] = {}

    async def run(self) -> None:
        due = time.perf_counter()
        while True:
            due += self._interval
            await asyncio.sleep(due - time.perf_counter())
            self.lags.append(time.perf_counter() - due)
            self.tick()

    def tick(self) -> None:
        now = time.monotonic()
        for request_id, (request, pending, arrived, count) in self.streams.items():
            count[0] += 1
            if count[0] > request.params.max_tokens:
                continue
            is_last = count[0] == request.params.max_tokens
            pending.append(
                EngineOutput(
                    request_id,
                    (self._token_ids[count[0] % len(self._token_ids)],),
                    finish_reason=FinishReason.LENGTH if is_last else None,
                    first_scheduled_time=now,
                )
            )
            self.num_tokens += 1
            arrived.set()

    async def generate(self, request: Request) -> AsyncGenerator[EngineOutput, None]:
        pending: list[EngineOutput] = []
        arrived = asyncio.Event()
        self.streams[request.request_id] = (request, pending, arrived, [0])
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                taken, pending[:] = pending[:], []
                output = taken[-1]
                if len(taken) > 1:  # as the real client does: what piled up is one output
                    output = replace(output, token_ids=tuple(t for o in taken for t in o.token_ids))
                yield output
                if taken[-1].finish_reason is not None:
                    return
        finally:
            del self.streams[request.request_id]

    def abort(self, request_id: str) -> None:
        """Nothing to end: the stream goes with its generator."""


async def _engine_alone(token_ids: list[int], num_streams: int, num_ticks: int) -> float:
    """CPU seconds a token of the fake engine and of waking its consumers."""
    from scheduler.messages import SamplingParams

    engine = TickingEngine(token_ids, 0.0)

    async def consume(index: int) -> None:
        params = SamplingParams(max_tokens=num_ticks)
        async for _ in engine.generate(Request(str(index), (1,), params)):
            pass

    tasks = [asyncio.create_task(consume(index)) for index in range(num_streams)]
    await asyncio.sleep(0)
    began = time.process_time()
    for _ in range(num_ticks):
        engine.tick()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    spent = time.process_time() - began
    await asyncio.gather(*tasks)
    return spent / engine.num_tokens


class _Reader(asyncio.Protocol):
    """Sends one request and counts what comes back."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.num_chunks = 0
        self.num_bytes = 0
        self._tail = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.num_chunks += data.count(b'"content":"') + data.count(b'"text":"')
        self.num_bytes += len(data)
        self._tail = (self._tail + data)[-64:]
        if b"data: [DONE]" in self._tail and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the stream ended early"))


def _client(port: int, num_streams: int, num_tokens: int, results: Any) -> None:
    async def run() -> tuple[int, int]:
        body = json.dumps(
            {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": num_tokens}
        ).encode()
        request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        loop = asyncio.get_running_loop()
        readers = []
        for _ in range(num_streams):
            _, reader = await loop.create_connection(lambda: _Reader(request), "127.0.0.1", port)
            readers.append(reader)
        await asyncio.gather(*(reader.done for reader in readers))
        return sum(reader.num_chunks for reader in readers), sum(reader.num_bytes for reader in readers)

    results.put(uvloop.run(run()))


async def _measure(num_streams: int, rate: float, seconds: float) -> None:
    tokenizer = load_tokenizer(fetch_default_model())
    token_ids = tokenizer.encode(_TEXT)
    num_tokens = int(rate * seconds)
    alone = await _engine_alone(token_ids, num_streams, 100)
    engine = TickingEngine(token_ids, 1 / rate)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(ServerConfig(), engine, tokenizer),
            host="127.0.0.1",
            port=0,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
        )
    )
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    client = context.Process(target=_client, args=(port, num_streams, num_tokens, results))
    client.start()
    while len(engine.streams) < num_streams:  # noqa: ASYNC110 - set-up
        await asyncio.sleep(0.01)
    ticking = asyncio.create_task(engine.run())
    began, before = time.perf_counter(), os.times()
    while engine.num_tokens < num_streams * num_tokens:  # noqa: ASYNC110 - 50 looks a second cost nothing
        await asyncio.sleep(0.02)
    wall, after = time.perf_counter() - began, os.times()
    user, system = after.user - before.user, after.system - before.system
    chunks, num_bytes = await asyncio.get_running_loop().run_in_executor(None, results.get)
    ticking.cancel()
    client.join()
    server.should_exit = True
    await serving
    lags = sorted(engine.lags)
    per_token = 1e6 / engine.num_tokens
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print(f"streams                        {num_streams}")
    print(f"tokens sent / chunks received  {engine.num_tokens} / {chunks - num_streams}")
    print(
        f"tokens/s                       {engine.num_tokens / wall:.0f} (asked for {num_streams * rate:.0f})"
    )
    print(f"bytes a token                  {num_bytes / engine.num_tokens:.0f}")
    print(f"CPU a token                    {(user + system) * per_token:.1f} us")
    print(f"  of which in the kernel       {system * per_token:.1f} us")
    print(f"  of which the fake engine     {alone * 1e6:.1f} us")
    print(f"loop lag p50 / p99 / max       {_at(lags, 0.5)} / {_at(lags, 0.99)} / {_at(lags, 1.0)} ms")


def _at(values: list[float], quantile: float) -> str:
    return f"{values[min(int(len(values) * quantile), len(values) - 1)] * 1e3:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU of the API process a streamed token.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens-per-second", type=float, default=100.0, help="of each stream")
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    uvloop.run(_measure(arguments.streams, arguments.tokens_per_second, arguments.seconds))


if __name__ == "__main__":
    main()
