"""``inflightd bench serve``: load on a running server, any that speaks OpenAI's API."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
from tqdm import tqdm

from server.bench.load_report import LoadReport, plot, report_of, table
from server.bench.stream_client import Run, Target, run_load
from server.bench.workload import PATHS, Workload, WorkloadError, poisson_starts, read_prompts

# In an open loop a server may fall behind; more connections than this help nobody.
_MOST_AT_ONCE = 4096


class BenchError(Exception):
    """No load can be run; the message says what to change."""


def run_bench(parsed: argparse.Namespace, api_key: str | None) -> int:
    """Runs the loads, prints the table; returns 1 if nothing could be run or every request failed."""
    try:
        target = Target.of(parsed.url, api_key)
        workload = Workload(
            endpoint=parsed.endpoint,
            model=parsed.model or _first_model(parsed.url, api_key),
            num_prompt_words=parsed.prompt_words,
            num_output_tokens=parsed.output_tokens,
            num_prefix_words=parsed.shared_prefix_words,
            prompts=read_prompts(parsed.prompts) if parsed.prompts else (),
            ignores_eos=not parsed.no_ignore_eos,
            temperature=parsed.temperature,
        )
        reports = list(_reports(parsed, target, workload))
        title = f"{workload.model} at {parsed.url}"
        print(table(reports))  # noqa: T201
        if parsed.json:
            document = {
                "url": parsed.url, "model": workload.model, "endpoint": workload.endpoint,
                "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seed": parsed.seed,
                "prompt_words": workload.num_prompt_words, "output_tokens": workload.num_output_tokens,
                "shared_prefix_words": workload.num_prefix_words,
                "loads": [report.as_json() for report in reports],
            }  # fmt: skip
            parsed.json.write_text(json.dumps(document, indent=1) + "\n")
        if parsed.plot:
            parsed.plot.write_text(plot(title, reports))
    except (BenchError, WorkloadError, ValueError, OSError) as error:
        print(f"inflightd bench: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0 if any(report.num_completed for report in reports) else 1


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
    for level in parsed.rate or parsed.concurrency:
        if parsed.rate:
            count = parsed.requests or max(8, round(30 * level))
            starts = poisson_starts(count, level, f"{parsed.seed} {level}")
            how: dict[str, Any] = {"concurrency": _MOST_AT_ONCE, "starts": starts}
            name = f"{level:g} a second"
        else:
            count = parsed.requests or max(8, 4 * level)
            how, name = {"concurrency": level}, f"{level} at once"
        # Prompts of one load are none of another: nothing may come from a prefix cache but what is shared.
        yield report_of(name, run(workload.bodies(count, f"{parsed.seed} {name}"), name, **how))


def _first_model(url: str, api_key: str | None) -> str:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=10.0)
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise BenchError(f"no list of models at {url}: {error}. Name one with --model.") from None
