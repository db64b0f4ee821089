"""The front end under load: real HTTP, real line to an engine process, steps that compute nothing.

    python -m tests.benchmarks.front_end [--streams 256] [--tokens-per-second 100] [--seconds 10]
                                         [--idle 2000 | --megabyte-prompts] [--api-workers 1]

Four processes: the API process (the product's own parts), the engine process (its own scheduler and line,
each step made to take a millisecond and to start so often a second), the client of the streams, and this one,
which holds the idle connections and sends the long prompts. Every token of every stream is compared with what
the engine sent. CPU is the process's own time (getrusage), which other work on the machine disturbs least;
times between tokens and lateness of the event loop are only worth something on an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import httpx
import uvloop

from server.config import ServerConfig
from server.model_source import fetch_default_model
from server.tokenizer import load_tokenizer
from tests.benchmarks.child_process import child_process
from tests.benchmarks.front_end_client import Seen, post, read_streams
from tests.benchmarks.front_end_server import Usage, metric, serve_api
from tests.benchmarks.paced_engine import Pace

_TEXT = " The quick brown fox jumps over the lazy dog, and then it does so again."
_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")


async def hold_idle(port: int, count: int, streams_end: asyncio.Future[Any]) -> list[asyncio.StreamWriter]:
    """Opens streams that wait for their turn, waits until all of them do, and leaves them open.

    Raises:
        TimeoutError: they got their turn, as the streams before them ended first.
        EOFError: nobody reads the streams any more.
    """
    request = post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 4},
    )
    writers = []
    try:
        for _ in range(count):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            writers.append(writer)
        while await metric(port, "num_requests_waiting") < count:
            if streams_end.done():
                streams_end.result()
                raise TimeoutError(
                    f"the streams ended before {count} idle ones waited: let them go on for longer"
                )
            await asyncio.sleep(0.2)
    except BaseException:
        for writer in writers:
            writer.transport.abort()
        raise
    return writers


async def send_long_prompts(port: int, count: int) -> list[float]:
    """A chat of 1 MB a second, each with other words; returns after how many seconds they were answered."""
    rng = random.Random(1)
    took: list[float] = []

    async def ask(client: httpx.AsyncClient, content: str) -> None:
        began = time.perf_counter()
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        response = await client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        took.append(time.perf_counter() - began)

    prompts = []
    for _ in range(count):
        words = rng.choices(_WORDS, k=200_000)
        prompts.append(" ".join(words)[: 2**20])
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        began = time.perf_counter()
        tasks = []
        for number, prompt in enumerate(prompts):
            await asyncio.sleep(began + number - time.perf_counter())
            tasks.append(asyncio.create_task(ask(client, prompt)))
        await asyncio.gather(*tasks)
    return took


@dataclass(frozen=True)
class Figures:
    """Of one run.

    Attributes:
        num_tokens: of all streams.
        num_counted: of these, in the ``seconds`` that were measured.
        user_us, system_us: CPU of the API process a token, microseconds.
        num_wrong: streams that lost a token, or got another.
        lags, gaps: seconds.
    """

    num_streams: int
    num_tokens: int
    num_counted: int
    num_wrong: int
    seconds: float
    user_us: float
    system_us: float
    bytes_a_token: float
    tokens_an_event: float
    lags: Sequence[float]
    gaps: Sequence[float]
    long_prompts: Sequence[float]


@dataclass(frozen=True)
class FrontEndLoad:
    """What a run does.

    Attributes:
        tokens_per_second: of each stream.
        seconds: how long the streams go on. It is measured once the idle ones are open, 2 ms each.
        num_idle: streams that wait for their turn meanwhile.
        num_workers: API processes.
        has_long_prompts: whether a chat of 1 MB comes every second. Not together with idle ones.
    """

    num_streams: int = 256
    tokens_per_second: float = 100.0
    seconds: float = 10.0
    num_idle: int = 0
    num_workers: int = 1
    has_long_prompts: bool = False


async def measure(load: FrontEndLoad) -> Figures:
    """One run.

    Raises:
        ConnectionError: an idle stream was cut off.
        EOFError: a process ended, say as one of its streams was cut off.
        TimeoutError: the streams ended before the idle ones were open.
    """
    num_streams, num_idle = load.num_streams, load.num_idle
    tokenizer = load_tokenizer(fetch_default_model())
    token_ids = tuple(tokenizer.encode(_TEXT))
    num_tokens = int(load.tokens_per_second * load.seconds)
    text = tokenizer.decode([token_ids[n % len(token_ids)] for n in range(num_tokens)])
    num_places = num_streams + load.has_long_prompts
    Pace(token_ids, load.tokens_per_second, num_places).to_environment()
    config = ServerConfig(
        port=0,
        api_workers=load.num_workers,
        # Whoever gets how many of them.
        max_queued_requests=load.num_workers * (num_idle + 1000),
        max_queued_tokens=2**24,
        queue_timeout=0,
        log_level="error",
    )
    loop = asyncio.get_running_loop()

    def usage(api: Connection) -> asyncio.Future[Usage]:
        api.send("usage")
        return loop.run_in_executor(None, api.recv)

    request = post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": num_tokens,
         "ignore_eos": True},
    )  # fmt: skip
    with child_process(serve_api, config) as api:
        port = await loop.run_in_executor(None, api.recv)
        with child_process(read_streams, port, request, num_streams, text) as streams:
            await loop.run_in_executor(None, streams.recv)
            streams_end = loop.run_in_executor(None, streams.recv)
            idle = await hold_idle(port, num_idle, streams_end)
            before, began = await usage(api), time.perf_counter()
            long_prompts: list[float] = []
            if load.has_long_prompts:
                long_prompts = await send_long_prompts(port, int(load.seconds) - 2)
            await streams_end
            seconds, after = time.perf_counter() - began, await usage(api)
            num_open = sum(not writer.is_closing() for writer in idle)
            if num_open != num_idle:
                raise ConnectionError(f"{num_idle - num_open} idle connections were closed")
            seen: Seen = await loop.run_in_executor(None, streams.recv)
            for writer in idle:
                writer.transport.abort()
    counted = after.num_tokens - before.num_tokens
    return Figures(
        num_streams=num_streams,
        num_tokens=num_streams * num_tokens,
        num_counted=counted,
        num_wrong=seen.num_wrong,
        seconds=seconds,
        user_us=(after.user_seconds - before.user_seconds) * 1e6 / counted,
        system_us=(after.system_seconds - before.system_seconds) * 1e6 / counted,
        bytes_a_token=seen.num_bytes / (num_streams * num_tokens),
        tokens_an_event=num_streams * num_tokens / seen.num_pieces,
        lags=sorted(after.lags),
        gaps=sorted(gap for gap, at in zip(seen.gaps, seen.times, strict=True) if at > began),
        long_prompts=sorted(long_prompts),
    )


def report(figures: Figures, num_idle: int) -> str:
    lines = [
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        f"streams, idle connections       {figures.num_streams}, {num_idle}",
        f"tokens                          {figures.num_tokens}",
        f"streams that lost any           {figures.num_wrong}",
        f"tokens/s while measured         {figures.num_counted / figures.seconds:.0f}",
        f"tokens an event                 {figures.tokens_an_event:.2f}",
        f"bytes a token                   {figures.bytes_a_token:.0f}",
        f"CPU of the API process a token  {figures.user_us + figures.system_us:.1f} us",
        f"  of which in the kernel        {figures.system_us:.1f} us",
        f"ITL p50 / p99 / max             {_quantiles(figures.gaps)} ms",
    ]
    if figures.lags:
        lines.append(f"loop lag p50 / p99 / max        {_quantiles(figures.lags)} ms")
    if figures.long_prompts:
        lines.append(f"1 MB prompts                    {len(figures.long_prompts)}")
        lines.append(f"  answered after p50 / p99 / max {_quantiles(figures.long_prompts)} ms")
    return "\n".join(lines)


def summary(figures: Figures, num_idle: int) -> str:
    """The figures in two sentences."""
    return (
        f"The front end with an engine that computes nothing, {figures.num_streams} streams, "
        f"{figures.num_counted / figures.seconds:.0f} tokens/s, {num_idle} idle connections: "
        f"{figures.user_us + figures.system_us:.1f} us of the API process's CPU a token; {figures.num_wrong} "
        f"streams lost any. Event loop late by p50 / p99 / max {_quantiles(figures.lags)} ms."
    )


def _quantiles(values: Sequence[float]) -> str:
    """``values`` are sorted."""
    places = (len(values) // 2, int(len(values) * 0.99), len(values) - 1)
    return " / ".join(f"{values[min(place, len(values) - 1)] * 1e3:.1f}" for place in places)


def main() -> None:
    parser = argparse.ArgumentParser(description="The front end under load, without a model.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens-per-second", type=float, default=100.0, help="of each stream")
    parser.add_argument("--seconds", type=float, default=10.0)
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument("--idle", type=int, default=0, help="streams that wait for their turn meanwhile")
    beside.add_argument("--megabyte-prompts", action="store_true", help="a chat of 1 MB a second meanwhile")
    parser.add_argument("--api-workers", type=int, default=1)
    arguments = parser.parse_args()
    load = FrontEndLoad(
        arguments.streams,
        arguments.tokens_per_second,
        arguments.seconds,
        arguments.idle,
        arguments.api_workers,
        arguments.megabyte_prompts,
    )
    print(report(uvloop.run(measure(load)), load.num_idle))


if __name__ == "__main__":
    main()
