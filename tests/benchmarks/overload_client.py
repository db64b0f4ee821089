"""Clients that want more than a server can do: how they send, how they come back, what they saw."""

from __future__ import annotations

import asyncio
import collections
import gc
import itertools
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvloop

from server.bench.random_prompts import distinct_prompts
from server.bench.stream_client import Exchange, Target, post
from server.bench.workload import poisson_starts

_PATH = "/v1/completions"
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Clients:
    """Clients of one kind.

    Attributes:
        rate: requests a second, with exponential gaps, whatever becomes of them; or
        at_once: so many, each of which sends its next request when it has the answer to the last.
        words, tokens: of prompts and answers, from and to; each as likely.
        num_retries: after a refusal, when the server says, as OpenAI's SDK does.
    """

    name: str
    key: str | None = None
    rate: float = 0.0
    at_once: int = 0
    words: tuple[int, int] = (63, 189)
    tokens: tuple[int, int] = (32, 96)
    num_retries: int = 0

    def requests(self, target: Target, model: str, count: int, seed: str) -> list[bytes]:
        """The bytes of ``count`` requests; no two prompts begin alike."""
        dice = random.Random(f"{seed} {self.name}")
        return [
            Target(target.host, target.port, api_key=self.key).request(
                _PATH,
                {
                    "model": model,
                    "prompt": " ".join(prompt.split()[: dice.randint(*self.words)]),
                    "max_tokens": dice.randint(*self.tokens),
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                },
            )
            for prompt in distinct_prompts(count, self.words[1], f"{seed} {self.name}")
        ]


@dataclass(slots=True)
class Attempt:
    """One try of one request. ``late`` is how many seconds after its time it was sent."""

    exchange: Exchange
    late: float
    number: int

    @property
    def status(self) -> int:
        """0 if nothing came."""
        reads = self.exchange.reads
        return int(reads[0][1][9:12]) if reads else 0

    @property
    def end(self) -> float:
        return self.exchange.reads[-1][0]

    @property
    def seconds_to_first_byte(self) -> float:
        return self.exchange.reads[0][0] - self.exchange.start

    @property
    def first_token(self) -> float:
        """When the first event came; a comment comes before it after a long wait. 0 if there was none."""
        return next((when for when, data in self.exchange.reads if b"data: " in data), 0.0)

    @property
    def num_tokens(self) -> int | None:
        """Of a whole answer; None if it is not one."""
        tail = b"".join(data for _, data in self.exchange.reads[-3:])
        found = re.search(rb'"completion_tokens":(\d+)', tail)
        return int(found[1]) if found and b"data: [DONE]" in tail else None

    @property
    def wait(self) -> float:
        """Seconds after which the server wants to see the client again."""
        found = re.search(rb"(?i)\r\nretry-after-ms: (\d+)", self.exchange.reads[0][1])
        return int(found[1]) / 1000 if found else 1.0


@dataclass(slots=True)
class Seen:
    """What clients of one kind saw, and when the window in which it counts began and ended."""

    clients: Clients
    attempts: list[Attempt] = field(default_factory=list)

    def figures(self, begin: float, end: float) -> dict[str, Any]:
        """Times are milliseconds."""
        inside = [a for a in self.attempts if begin <= a.exchange.start < end]
        answered = [a for a in self.attempts if a.status == 200]
        whole = [a for a in answered if begin <= a.end < end and a.num_tokens is not None]
        refused = [a for a in inside if a.status == 429]
        return {
            "tokens_per_s": sum(a.num_tokens or 0 for a in whole) / (end - begin),
            "answers_per_s": len(whole) / (end - begin),
            "offered_per_s": len(inside) / (end - begin),
            "refused": len(refused),
            "refused_ms": percentiles(1000 * a.seconds_to_first_byte for a in refused),
            "retry_after_s": percentiles(a.wait for a in refused),
            "late_ms": percentiles(1000 * a.late for a in inside),
            "ttft_ms": percentiles(
                1000 * (a.first_token - a.exchange.start) for a in answered if begin <= a.first_token < end
            ),
            "tries_of_answered": statistics.mean([a.number for a in whole]) if whole else 0,
            "failures": dict(
                collections.Counter(
                    f"{a.status} {a.exchange.failure[:80]}"
                    for a in inside
                    if a.exchange.failure and a.status != 429
                )
            ),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Load:
    """All that clients saw in the window, and the client's own CPU in cores."""

    figures: dict[str, dict[str, Any]]
    client_cores: float


def run(
    target: Target,
    model: str,
    kinds: Sequence[Clients],
    *,
    ramp: float,
    window: float,
    seed: str,
    at_begin: Callable[[], None],
    at_end: Callable[[], None],
) -> Load:
    """Loads a server for ``ramp + window`` seconds, then hangs up on whatever runs.

    Args:
        at_begin, at_end: called when the window begins and ends; they must not take long.
    """
    prepared = []
    for kind in kinds:
        starts: Sequence[float] = ()
        count = 6000
        if kind.rate:
            count = int(kind.rate * (ramp + window) * 1.1) + 20
            starts = poisson_starts(count, kind.rate, f"{seed} {kind.name}")
        prepared.append((Seen(kind), kind.requests(target, model, count, seed), starts))
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        return uvloop.run(_run(target, prepared, ramp, window, at_begin, at_end))
    finally:
        gc.enable()


async def _run(
    target: Target,
    prepared: Sequence[tuple[Seen, list[bytes], Sequence[float]]],
    ramp: float,
    window: float,
    at_begin: Callable[[], None],
    at_end: Callable[[], None],
) -> Load:
    start = time.perf_counter()
    tasks: set[asyncio.Task[None]] = set()

    def begin(work: Any) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def open_loop(seen: Seen, requests: Iterable[bytes], starts: Sequence[float]) -> None:
        for request, offset in zip(requests, starts, strict=True):
            due = start + offset
            await asyncio.sleep(due - time.perf_counter())
            begin(_send(target, request, due, seen))

    async def closed_loop(seen: Seen, requests: Iterable[bytes]) -> None:
        for request in requests:  # shared by all
            await _send(target, request, time.perf_counter(), seen)

    for seen, requests, starts in prepared:
        if starts:
            begin(open_loop(seen, requests, starts))
        else:
            shared = itertools.cycle(requests)
            for _ in range(seen.clients.at_once):
                begin(closed_loop(seen, shared))
    await asyncio.sleep(ramp)
    began, began_cpu = time.perf_counter(), time.process_time()
    at_begin()
    await asyncio.sleep(window)
    ended, ended_cpu = time.perf_counter(), time.process_time()
    at_end()
    running = list(tasks)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    figures = {seen.clients.name: seen.figures(began, ended) for seen, _, _ in prepared}
    return Load(figures, (ended_cpu - began_cpu) / (ended - began))


async def _send(target: Target, request: bytes, due: float, seen: Seen) -> None:
    for number in range(1, seen.clients.num_retries + 2):
        attempt = Attempt(Exchange(time.perf_counter()), time.perf_counter() - due, number)
        seen.attempts.append(attempt)
        await post(target, request, attempt.exchange, _TIMEOUT_S)
        if attempt.status not in (429, 503) or number > seen.clients.num_retries:
            return
        wait = attempt.wait
        await asyncio.sleep(wait)
        due = time.perf_counter()


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """How many, the middle, the 99th of a hundred, the least and the greatest; nothing of nothing."""
    ordered = sorted(values)
    if not ordered:
        return {}

    def at(percent: int) -> float:
        return round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 3)

    return {
        "n": len(ordered),
        "p50": at(50),
        "p99": at(99),
        "min": round(ordered[0], 3),
        "max": round(ordered[-1], 3),
    }
