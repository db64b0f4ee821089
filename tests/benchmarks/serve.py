"""Measures inflightd over HTTP, side by side with other servers, and prints Markdown tables.

    python -m tests.benchmarks.serve                           inflightd alone, with its embedded model
    python -m tests.benchmarks.serve --peers DIR               and every peer that peers.py has set up in DIR
    python -m tests.benchmarks.serve --peers DIR --write FILE  writes the report as well

A round starts every server in turn, warms it up and runs a closed loop of streamed completions at each
concurrency; the report has the medians of the rounds. All servers get the same prompts, and no prompt begins
like another.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import uvloop

from server.bench.random_prompts import distinct_prompts
from server.bench.stream_client import Answer, ResponseError, Target, read_answer, run_load
from server.model_source import fetch_default_model
from tests.benchmarks.figures import Figures, Load, Result, Start, machine, median_result, tables
from tests.benchmarks.front_end import FrontEndLoad, summary
from tests.benchmarks.front_end import measure as measure_front_end
from tests.benchmarks.peers import installed_peers
from tests.benchmarks.server_process import Server, ServerError, ServerProcess, machine_cpu_seconds
from tests.benchmarks.step_loop import measure as measure_step_loop

OURS = "inflightd"
REQUEST_TIMEOUT = 300.0  # seconds


def inflightd(model: Path, flags: Sequence[str]) -> Server:
    """The server of this checkout."""
    executable = Path(sys.executable).with_name("inflightd")
    return Server(
        name=OURS,
        version=f"{version('inflightd')} {_commit()}".strip(),
        command=(str(executable), "serve", str(model), "--host", "127.0.0.1", "--port", "{port}", *flags),
        ready_path="/health/ready",
        setting=" ".join(flags) or "defaults",
    )


def measure_server(server: Server, loads: Sequence[Load], log: Path, path: str) -> Result:
    """Starts the server, warms it up, puts it under each load in turn, and stops it.

    Raises:
        ServerError: it does not start, or answers nothing.
    """
    with ServerProcess(server, log) as process:
        for concurrency in (1, max(load.concurrency for load in loads)):
            warm_up = Load(concurrency, 2 * concurrency, loads[0].num_prompt_tokens, 16)
            _measure_load(process, server, warm_up, path, seed=f"warm-up {concurrency}")
        figures = []
        for load in loads:
            figures.append(_measure_load(process, server, load, path, seed=f"load {load.concurrency}"))
            print(f"  {load.concurrency} at once: {figures[-1]}", file=sys.stderr, flush=True)
        return Result(server, Start(process.seconds_to_first_answer, process.peak_memory()), tuple(figures))


def _measure_load(process: ServerProcess, server: Server, load: Load, path: str, seed: str) -> Figures:
    bodies = [
        {
            "model": process.model,
            **_prompt(path, prompt),
            "max_tokens": load.num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **server.body,
        }
        for prompt in distinct_prompts(load.num_requests, load.num_prompt_tokens, seed)
    ]
    machine_cpu, server_cpu = machine_cpu_seconds(), process.cpu_seconds()
    run = run_load(
        Target("127.0.0.1", process.port),
        path,
        bodies,
        concurrency=load.concurrency,
        seconds_for_one=REQUEST_TIMEOUT,
    )
    server_cpu = process.cpu_seconds() - server_cpu
    other_cpu = machine_cpu_seconds() - machine_cpu - server_cpu - run.client_cpu_seconds

    answers: list[Answer] = []
    for exchange in run.exchanges:
        try:
            answers.append(read_answer(exchange))
        except ResponseError as error:
            print(f"  {server.name}: {error}", file=sys.stderr, flush=True)
    if not answers:
        raise ServerError(f"{server.name} answered none of {load.num_requests} requests")
    end = max(answer.token_times[-1] for answer in answers)
    num_tokens = sum(answer.num_output_tokens for answer in answers)
    num_right = sum(answer.num_output_tokens == load.num_output_tokens for answer in answers)
    ttfts = [answer.token_times[0] - answer.start for answer in answers]
    gaps = [gap for answer in answers for gap in _gaps(answer.token_times)]
    return Figures(
        tokens_per_second=num_tokens / (end - min(answer.start for answer in answers)),
        ttft_p50=_percentile(ttfts, 50),
        ttft_p99=_percentile(ttfts, 99),
        itl_p50=_percentile(gaps, 50),
        itl_p99=_percentile(gaps, 99),
        num_wrong=load.num_requests - num_right,
        num_prompt_tokens=statistics.mean(answer.num_prompt_tokens for answer in answers),
        server_cpu=server_cpu,
        client_cpu_per_token=run.client_cpu_seconds / num_tokens,
        other_load=max(0.0, other_cpu / run.seconds),
    )


def _prompt(path: str, text: str) -> dict[str, object]:
    if path.endswith("/chat/completions"):
        return {"messages": [{"role": "user", "content": text}]}
    return {"prompt": text}


def _gaps(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def _percentile(values: Iterable[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure inflightd and its peers over HTTP.")
    parser.add_argument("--model", type=Path, help="GGUF file for inflightd (default: the embedded model)")
    parser.add_argument("--peers", type=Path, help="directory that peers.py has set up")
    parser.add_argument(
        "--only", default="", help="only servers whose name contains one of these, with commas"
    )
    parser.add_argument("--flags", default="", help="further flags of inflightd serve")
    parser.add_argument("--concurrency", type=_numbers, default=[1, 8, 32])
    parser.add_argument("--requests", type=_numbers, default=[16, 64, 128], help="for each concurrency")
    parser.add_argument("--prompt-tokens", type=int, default=126)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chat", action="store_true", help="/v1/chat/completions, not /v1/completions")
    parser.add_argument("--write", type=Path, help="write the report to this file")
    return parser.parse_args()


def _servers(arguments: argparse.Namespace) -> list[Server]:
    model = arguments.model
    if model is None:
        model = fetch_default_model()
    servers = [inflightd(model, shlex.split(arguments.flags))]
    if arguments.peers is not None:
        servers += installed_peers(arguments.peers.resolve())
    parts = arguments.only.split(",")
    return [server for server in servers if any(part in server.name for part in parts)]


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no server behind
    arguments = _parse()
    servers = _servers(arguments)
    loads = [
        Load(concurrency, num_requests, arguments.prompt_tokens, arguments.output_tokens)
        for concurrency, num_requests in zip(arguments.concurrency, arguments.requests, strict=True)
    ]
    path = "/v1/chat/completions" if arguments.chat else "/v1/completions"
    rounds: dict[str, list[Result]] = {server.name: [] for server in servers}
    with tempfile.TemporaryDirectory() as logs:
        for number in range(1, arguments.rounds + 1):
            for server in servers:
                print(f"round {number}: {server.name}", file=sys.stderr, flush=True)
                log = Path(logs) / f"{server.name}.log"
                try:
                    rounds[server.name].append(measure_server(server, loads, log, path))
                except ServerError as error:
                    if server.name == OURS:
                        raise
                    print(f"left out of this round: {error}", file=sys.stderr, flush=True)

    step_loop = measure_step_loop()
    num_idle = 2000
    front_end = uvloop.run(measure_front_end(FrontEndLoad(seconds=20.0, num_idle=num_idle)))
    results = [median_result(of_server) for of_server in rounds.values() if of_server]
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    report = (
        f"{machine()}\n\n"
        f"{today}, streamed POST {path}, {arguments.prompt_tokens} words in, "
        f"{arguments.output_tokens} tokens out, greedy, closed loop; medians of {arguments.rounds} rounds. "
        f"Ratios above 1 are in favour of {OURS}.\n\n{tables(results, loads, OURS)}\n\n"
        f"The step loop's own cost with {step_loop['num_sequences']:.0f} running sequences, executor faked: "
        f"median {step_loop['median_ms']:.2f} ms, p99 {step_loop['p99_ms']:.2f} ms a step.\n\n"
        f"{summary(front_end, num_idle)}\n"
    )
    print(report)
    if arguments.write is not None:
        arguments.write.write_text(f"# Serving on a CPU\n\n{report}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
