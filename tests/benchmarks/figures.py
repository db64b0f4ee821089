"""The figures of a benchmark and the Markdown tables that show them."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeVar

from tests.benchmarks.server_process import Server

CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
)
TIMES = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop of ``num_requests``, ``concurrency`` at a time, each of so many tokens in and out."""

    concurrency: int
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What one server did under one load. Times are seconds; percentiles are over all requests of the run.

    Attributes:
        ttft_p50, ttft_p99: from sending a request to the first event that carries text.
        itl_p50, itl_p99: gaps between the events of one stream that carry text.
        num_wrong: failed requests and answers of another length than asked for.
        server_cpu: CPU seconds of all processes of the server.
        client_cpu_per_token: CPU seconds of the client itself, for each token it received.
        other_load: cores that were busy with neither the server nor the client.
    """

    tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    num_wrong: float
    num_prompt_tokens: float
    server_cpu: float
    client_cpu_per_token: float
    other_load: float


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the start of the process to the first answer; bytes of memory at the peak of all loads."""

    seconds_to_first_answer: float
    peak_memory: float


@dataclass(frozen=True, slots=True)
class Result:
    """One server in one round, or the medians of its rounds; ``figures`` are in the order of the loads."""

    server: Server
    start: Start
    figures: tuple[Figures, ...]


Record = TypeVar("Record", Figures, Start)


def median_result(rounds: Sequence[Result]) -> Result:
    """The median of each figure of the same server and the same loads."""
    return Result(
        rounds[0].server,
        _medians([result.start for result in rounds]),
        tuple(_medians(of_load) for of_load in zip(*(result.figures for result in rounds), strict=True)),
    )


def _medians(records: Sequence[Record]) -> Record:
    columns = zip(*(astuple(record) for record in records), strict=True)
    return type(records[0])(*map(statistics.median, columns))


def tables(results: Sequence[Result], loads: Sequence[Load], ours: str) -> str:
    """Markdown: each load with every server and the ratio of ``ours`` to the best peer; then the servers."""
    lines = [
        "| at once | server | output tokens/s | TTFT p50 ms | p99 | ITL p50 ms | p99 "
        "| wrong | server CPU s | client CPU µs/token | other load, cores |",
        "|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for i, load in enumerate(loads):
        lines += [_row(load, result.server.name, result.figures[i]) for result in results]
        own = [result.figures[i] for result in results if result.server.name == ours]
        peers = [result.figures[i] for result in results if result.server.name != ours]
        if own and peers:
            ratios = " | ".join(f"**{ratio:.2f}x**" for ratio in _ratios(own[0], peers))
            lines.append(f"| {load.concurrency} | **{ours} to the best peer** | {ratios} | | | | |")
    lines += [
        "",
        "| server | start to first answer s | peak memory MB | prompt tokens | version | setting |",
        "|:--|--:|--:|--:|:--|:--|",
    ]
    for result in results:
        prompt_tokens = statistics.mean(figures.num_prompt_tokens for figures in result.figures)
        lines.append(
            f"| {result.server.name} | {result.start.seconds_to_first_answer:.1f} "
            f"| {result.start.peak_memory / 1e6:.0f} | {prompt_tokens:.1f} "
            f"| {result.server.version} | {result.server.setting} |"
        )
    return "\n".join(lines)


def _row(load: Load, name: str, figures: Figures) -> str:
    times = " | ".join(_milliseconds(getattr(figures, name)) for name in TIMES)
    return (
        f"| {load.concurrency} | {name} | {figures.tokens_per_second:.0f} | {times} "
        f"| {figures.num_wrong:.0f} | {figures.server_cpu:.1f} | {figures.client_cpu_per_token * 1e6:.0f} "
        f"| {figures.other_load:.2f} |"
    )


def _ratios(own: Figures, peers: Sequence[Figures]) -> list[float]:
    """Against the best peer in each column; above 1 the own server is better."""
    throughput = own.tokens_per_second / max(peer.tokens_per_second for peer in peers)
    return [throughput, *(min(getattr(peer, name) for peer in peers) / getattr(own, name) for name in TIMES)]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f}" if seconds < 0.1 else f"{seconds * 1000:.0f}"


def machine() -> str:
    """The machine in one line: processor, cores, the instructions that matter, memory, system."""
    info = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        info[name.strip()] = value.strip()
    present = set(info["flags"].split())
    flags = ", ".join(flag for flag in CPU_FLAGS if flag in present)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{info['model name']} (family {info['cpu family']}, model {info['model']}), "
        f"{len(os.sched_getaffinity(0))} cores; {flags}; {memory:.0f} GiB; "
        f"Linux {platform.release().split('-')[0]}"
    )
