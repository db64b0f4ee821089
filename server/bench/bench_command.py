"""``inflightd bench``: load on a server that runs, or on one that is started for it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from server.bench.load_report import LoadReport, latency_table, plot, report_of, table, throughput_table
from server.bench.own_server import OwnServer, OwnServerError
from server.bench.startup import measure_start, startup_table
from server.bench.stream_client import Run, Target, run_load
from server.bench.workload import PATHS, Workload, WorkloadError, poisson_starts, read_prompts

# In an open loop a server may fall behind; more connections than this help nobody.
_MOST_AT_ONCE = 4096
_LATENCY_REQUESTS = 20
_THROUGHPUT_REQUESTS = 128


class BenchError(Exception):
    """No load can be run; the message says what to change."""


def run_bench(parsed: argparse.Namespace, api_key: str | None) -> int:
    """Runs what was asked for, prints a table; returns 1 if nothing could be run or every request failed.

    Interrupted, it shows the loads that are complete, and returns 130.
    """
    try:
        if parsed.bench == "startup":
            return _bench_startup(parsed, api_key)
        if parsed.url and getattr(parsed, "flags", None):
            raise BenchError("flags behind -- are for a server that is started; leave out --url or them")
        with ExitStack() as stack:
            url: str = parsed.url or stack.enter_context(OwnServer(parsed.flags, api_key)).url
            return _bench_load(parsed, url.rstrip("/").removesuffix("/v1"), api_key)
    except (BenchError, OwnServerError, WorkloadError, httpx.HTTPError, ValueError, OSError) as error:
        print(f"inflightd bench: {error}", file=sys.stderr)  # noqa: T201
        return 1


def _bench_startup(parsed: argparse.Namespace, api_key: str | None) -> int:
    starts = [measure_start(parsed.flags, api_key) for _ in range(parsed.runs)]
    print(startup_table(starts))  # noqa: T201
    document = {"flags": parsed.flags, "starts": [start.as_json() for start in starts]}
    _write_json(parsed.json, parsed.bench, document)
    return 0


def _bench_load(parsed: argparse.Namespace, url: str, api_key: str | None) -> int:
    target = Target.of(url, api_key)
    workload = Workload(
        endpoint=parsed.endpoint,
        model=parsed.model or _first_model(url, api_key),
        num_prompt_words=parsed.prompt_words,
        num_output_tokens=parsed.output_tokens,
        num_prefix_words=parsed.shared_prefix_words,
        prompts=read_prompts(parsed.prompts) if parsed.prompts else (),
        ignores_eos=not parsed.no_ignore_eos,
        temperature=parsed.temperature,
    )
    reports: list[LoadReport] = []
    is_interrupted = False
    try:
        for report in _reports(parsed, target, workload):
            reports.append(report)  # noqa: PERF402 - those before an interruption stay
    except KeyboardInterrupt:
        if not reports:
            raise
        is_interrupted = True
    tables = {"serve": table, "throughput": throughput_table, "latency": latency_table}
    print(tables[parsed.bench](reports))  # noqa: T201
    document = {
        "url": url, "model": workload.model, "endpoint": workload.endpoint, "seed": parsed.seed,
        "prompt_words": workload.num_prompt_words, "output_tokens": workload.num_output_tokens,
        "shared_prefix_words": workload.num_prefix_words,
        "loads": [report.as_json() for report in reports],
    }  # fmt: skip
    _write_json(parsed.json, parsed.bench, document)
    if parsed.plot:
        parsed.plot.write_text(plot(f"{workload.model} at {url}", reports))
    if is_interrupted:
        print("inflightd bench: interrupted", file=sys.stderr)  # noqa: T201
        return 130
    return 0 if any(report.num_completed for report in reports) else 1


def _write_json(path: Path | None, kind: str, document: dict[str, object]) -> None:
    if path is not None:
        document = {"bench": kind, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **document}
        path.write_text(json.dumps(document, indent=1) + "\n")


def _reports(parsed: argparse.Namespace, target: Target, workload: Workload) -> Iterator[LoadReport]:
    path = PATHS[workload.endpoint]

    def run(bodies: list[dict[str, object]], name: str, **how: Any) -> Run:
        with tqdm(total=len(bodies), desc=name, unit="request", leave=False, disable=None) as bar:

            def count_one() -> None:
                bar.update()

            return run_load(target, path, bodies, seconds_for_one=parsed.timeout, on_end=count_one, **how)

    warm_up = report_of(
        "warm-up", run(workload.bodies(1, f"{parsed.seed} warm-up"), "warm-up", concurrency=1)
    )
    for failure in warm_up.failures:
        raise BenchError(f"the first request failed: {failure}")
    for name, count, how in _loads(parsed):
        # Prompts of one load are none of another: nothing may come from a prefix cache but what is shared.
        yield report_of(name, run(workload.bodies(count, f"{parsed.seed} {name}"), name, **how))


def _loads(parsed: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(name, number of requests, arguments of ``run_load``) of each load."""
    if parsed.bench == "latency":
        yield "1 at once", parsed.requests or _LATENCY_REQUESTS, {"concurrency": 1}
    elif parsed.bench == "throughput":
        count = parsed.requests or _THROUGHPUT_REQUESTS
        at_once = min(parsed.concurrency or count, count, _MOST_AT_ONCE)
        yield f"{at_once} at once", count, {"concurrency": at_once}
    elif parsed.rate:
        for rate in parsed.rate:
            count = parsed.requests or max(8, round(30 * rate))
            starts = poisson_starts(count, rate, f"{parsed.seed} {rate}")
            yield f"{rate:g} a second", count, {"concurrency": _MOST_AT_ONCE, "starts": starts}
    else:
        for at_once in parsed.concurrency:
            count = parsed.requests or max(8, 4 * at_once)
            yield f"{at_once} at once", count, {"concurrency": at_once}


def _headers(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _first_model(url: str, api_key: str | None) -> str:
    try:
        response = httpx.get(f"{url}/v1/models", headers=_headers(api_key), timeout=10.0)
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        told = str(error).partition("\n")[0]  # httpx adds a page about the status
        raise BenchError(f"no list of models at {url}: {told}. Name one with --model.") from None
