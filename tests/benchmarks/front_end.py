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
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import uvloop

from server.config import ServerConfig
from server.model_source import fetch_default_model
from server.tokenizer import load_tokenizer
from tests.benchmarks.paced_engine import Pace

_TEXT = " The quick brown fox jumps over the lazy dog, and then it does so again."
_PROBE_EVERY_S = 0.005
_ENGINE = "tests.benchmarks.paced_engine"
_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")


# ---- the API process ----


@dataclass(frozen=True)
class Usage:
    """What the API process has used since it started, and how late its loop was since the last look."""

    user_seconds: float
    system_seconds: float
    num_tokens: int
    rss_bytes: int
    lags: tuple[float, ...] = ()


def serve_api(answers: Connection, config: ServerConfig) -> None:
    """Serves until told to stop; tells its port first, then its ``Usage`` whenever it is asked."""
    logging.basicConfig(level=logging.CRITICAL)  # streams that are cut off at the end are no news
    uvloop.run((_serve_alone if config.api_workers == 1 else _serve_by_workers)(answers, config))


async def _serve_alone(answers: Connection, config: ServerConfig) -> None:
    from server.api_process import http_server, load_application
    from server.engine_client import ZmqEngineClient
    from server.listening import listen

    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    model = fetch_default_model()
    engine = ZmqEngineClient(config, str(model), module=_ENGINE, on_ready=lambda _: ready.set())
    engine.start()
    app, _ = await load_application(config, model, engine, None)
    server = http_server(config, app)
    listener = listen(config)
    lags: list[float] = []

    def probe(due: float) -> None:
        now = loop.time()
        lags.append(now - due)
        loop.call_later(_PROBE_EVERY_S, probe, now + _PROBE_EVERY_S)

    def answer() -> None:
        if answers.recv() == "stop":
            server.end(at_once=True)
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        with open("/proc/self/statm") as file:
            rss = int(file.read().split()[1]) * resource.getpagesize()
        tokens = app.state.service.metrics.generation_tokens
        answers.send(Usage(used.ru_utime, used.ru_stime, tokens, rss, tuple(lags)))
        lags.clear()

    await ready.wait()
    loop.add_reader(answers.fileno(), answer)
    probe(loop.time())
    answers.send(listener.getsockname()[1])
    await server.serve(sockets=[listener])
    await app.state.service.close()
    await engine.stop()


async def _serve_by_workers(answers: Connection, config: ServerConfig) -> None:
    from server.listening import listen
    from server.worker_supervisor import WorkerSupervisor

    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    listener = listen(config)
    port = listener.getsockname()[1]
    model = str(fetch_default_model())
    supervisor = WorkerSupervisor(
        config, model, listener, module=_ENGINE, on_serving=lambda _: ready.set()
    )  # fmt: skip
    running = asyncio.create_task(supervisor.run())
    await ready.wait()
    answers.send(port)
    while await loop.run_in_executor(None, answers.recv) != "stop":
        answers.send(_usage_of_workers(int(await metric(port, "generation_tokens_total"))))
    supervisor.end(signal.SIGTERM)
    supervisor.end(signal.SIGTERM)
    await running


def _usage_of_workers(num_tokens: int) -> Usage:
    """CPU of all processes that serve, to a hundredth of a second each; the loops' lateness is not known."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    ticks, pages = [0, 0], 0
    for pid in children:
        if b"server.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks = [ticks[0] + int(fields[11]), ticks[1] + int(fields[12])]
            pages += int(fields[21])
    user, system = (each / os.sysconf("SC_CLK_TCK") for each in ticks)
    return Usage(user, system, num_tokens, pages * resource.getpagesize())


# ---- the client of the streams ----


class _Reader(asyncio.Protocol):
    """Sends one request and keeps what comes back, and when. Taken apart once the clock has stopped."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.arrivals: list[tuple[float, bytes]] = []
        loop = asyncio.get_running_loop()
        self.begun = loop.create_future()
        self.done = loop.create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.arrivals.append((time.perf_counter(), data))
        if not self.begun.done():
            self.begun.set_result(None)
        self._tail = (self._tail + data)[-len(_END) :]
        if self._tail == _END:
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        for future in (self.begun, self.done):
            if not future.done():
                future.set_exception(error or ConnectionError("the stream ended early"))
                future.exception()


@dataclass(frozen=True)
class Seen:
    """What the client saw.

    Attributes:
        num_pieces: events with text, of one token or of several that arrived together.
        num_wrong: streams whose text is not, letter by letter, what the engine sent.
        gaps: seconds between two arrivals of tokens in a stream, of all streams.
        times: when each gap ended (``time.perf_counter``, one clock for all processes).
    """

    num_bytes: int
    num_pieces: int
    num_wrong: int
    gaps: tuple[float, ...]
    times: tuple[float, ...]


def read_streams(answers: Connection, port: int, request: bytes, num_streams: int, text: str) -> None:
    """Opens all streams, says so, reads them to their ends and says what was ``Seen``."""
    answers.send(uvloop.run(_read_streams(answers, port, request, num_streams, text)))


async def _read_streams(answers: Connection, port: int, request: bytes, num_streams: int, text: str) -> Seen:
    loop = asyncio.get_running_loop()
    readers = []
    for _ in range(num_streams):
        _, reader = await loop.create_connection(lambda: _Reader(request), "127.0.0.1", port)
        readers.append(reader)
    await asyncio.gather(*(reader.begun for reader in readers))
    answers.send("begun")
    await asyncio.gather(*(reader.done for reader in readers))
    answers.send("done")
    num_bytes = num_pieces = num_wrong = 0
    gaps, times = [], []
    for reader in readers:
        with_text = [(at, data) for at, data in reader.arrivals if b'"content":"' in data]
        body = _dechunked(b"".join(data for _, data in reader.arrivals))
        pieces = [
            json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            for line in body.splitlines()
            if line.startswith(b"data: {")
        ]
        num_bytes += len(body)
        is_wrong = "".join(pieces) != text
        num_wrong += is_wrong
        num_pieces += len(pieces) - pieces.count("")
        gaps += [after[0] - before[0] for before, after in pairwise(with_text)]
        times += [at for at, _ in with_text[1:]]
    return Seen(num_bytes, num_pieces, num_wrong, tuple(gaps), tuple(times))


def _dechunked(response: bytes) -> bytes:
    """The body of a response in chunks."""
    _, _, rest = response.partition(b"\r\n\r\n")
    parts = []
    position = 0
    while True:
        end = rest.index(b"\r\n", position)
        length = int(rest[position:end], 16)
        if not length:
            return b"".join(parts)
        parts.append(rest[end + 2 : end + 2 + length])
        position = end + 2 + length + 2


def post(path: str, body: dict[str, Any]) -> bytes:
    """A request as bytes."""
    encoded = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(encoded), encoded)


# ---- the load beside them ----


async def hold_idle(port: int, count: int) -> list[asyncio.StreamWriter]:
    """Opens streams that wait for their turn, waits until all of them do, and leaves them open."""
    request = post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 4},
    )
    writers = []
    for _ in range(count):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        writers.append(writer)
    while await metric(port, "num_requests_waiting") < count:  # noqa: ASYNC110 - it is another process
        await asyncio.sleep(0.2)
    return writers


async def metric(port: int, name: str) -> float:
    """The value of a metric of the server."""
    async with httpx.AsyncClient() as client:
        page = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    found = re.search(rf"^inflightd:{name}\S* (\S+)$", page, re.MULTILINE)
    assert found is not None, f"{name} is not in /metrics"
    return float(found[1])


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


# ---- the measurement ----


@dataclass(frozen=True)
class Figures:
    """Of one run.

    Attributes:
        user_us, system_us: CPU of the API process a token, microseconds.
        num_wrong: streams that lost a token, or got another.
        lags, gaps: seconds.
    """

    num_streams: int
    num_tokens: int
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
        seconds: how long the streams go on.
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
    """One run. Raises ConnectionError if a stream is cut off."""
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
        log_level="error",
    )
    spawn = multiprocessing.get_context("spawn")
    api, api_end = spawn.Pipe()
    server = spawn.Process(target=serve_api, args=(api_end, config))
    server.start()
    loop = asyncio.get_running_loop()

    def ask(pipe: Connection, question: str = "usage") -> asyncio.Future[Any]:
        pipe.send(question)
        return loop.run_in_executor(None, pipe.recv)

    port = await loop.run_in_executor(None, api.recv)
    streams, streams_end = spawn.Pipe()
    request = post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": num_tokens,
         "ignore_eos": True},
    )  # fmt: skip
    client = spawn.Process(target=read_streams, args=(streams_end, port, request, num_streams, text))
    try:
        client.start()
        await loop.run_in_executor(None, streams.recv)
        idle = await hold_idle(port, num_idle)
        before, began = await ask(api), time.perf_counter()
        long_prompts: list[float] = []
        if load.has_long_prompts:
            long_prompts = await send_long_prompts(port, int(load.seconds) - 2)
        await loop.run_in_executor(None, streams.recv)
        seconds, after = time.perf_counter() - began, await ask(api)
        num_open = sum(not writer.is_closing() for writer in idle)
        if num_open != num_idle:
            raise ConnectionError(f"{num_idle - num_open} idle connections were closed")
        seen: Seen = await loop.run_in_executor(None, streams.recv)
        for writer in idle:
            writer.transport.abort()
    finally:
        api.send("stop")
        client.join()
        server.join()
    counted = after.num_tokens - before.num_tokens
    return Figures(
        num_streams=num_streams,
        num_tokens=num_streams * num_tokens,
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
        f"tokens/s while measured         {figures.num_tokens / figures.seconds:.0f}",
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
        f"{figures.num_tokens / figures.seconds:.0f} tokens/s, {num_idle} idle connections: "
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
