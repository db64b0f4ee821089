"""A server that ten times as much is asked of as it can do, with its clients on the same cores.

    python -m tests.benchmarks.overload FILE.jsonl                        one round of this checkout, appended
    python -m tests.benchmarks.overload FILE.jsonl --checkout before=DIR  of another checkout's server
    python -m tests.benchmarks.overload FILE.jsonl --table                medians of all rounds, as Markdown

A round starts a server with the embedded model and offers, one after the other: as much as it can do (128
closed loops), ten times as many requests a second, the same with clients that come back when they are told,
and ten times as many closed loops as sequences run, without a pause. ``--scenario flood`` is one key's long
prompts beside another's short ones, ``--scenario pool`` little memory. Meanwhile a probe asks for
``/health/live``, and the kernel tells how long the processes waited for a core.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from server.bench.stream_client import Target
from server.model_source import fetch_default_model
from tests.benchmarks.overload_client import Clients, percentiles, run
from tests.benchmarks.overload_table import table
from tests.benchmarks.server_process import Server, ServerProcess

_ROOT = Path(__file__).parents[2]
_RAMP_S, _WINDOW_S = 6.0, 20.0
_AT_ONCE = 128  # twice the sequences that run: the engine never lacks any
_TIMES = 10


def server(checkout: Path, flags: tuple[str, ...]) -> Server:
    """The server of a checkout, whatever is installed."""
    model = str(fetch_default_model())
    command = (
        sys.executable,
        "-m",
        "server.cli",
        "serve",
        model,
        "--port",
        "{port}",
        "--log-level",
        "warning",
    )
    return Server(
        "inflightd",
        "",
        (*command, *flags),
        environment={"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"},
        ready_path="/health/ready",
    )


def _overload(offer: Callable[..., dict[str, Any]]) -> Iterator[dict[str, Any]]:
    peak = offer("saturation", Clients("clients", at_once=_AT_ONCE))
    yield peak
    rate = _TIMES * peak["clients"]["answers_per_s"]
    yield offer("overload", Clients("clients", rate=rate))
    yield offer("coming back", Clients("clients", rate=rate, num_retries=2))
    yield offer("hammering", Clients("clients", at_once=_TIMES * 64))


def _flood(offer: Callable[..., dict[str, Any]]) -> Iterator[dict[str, Any]]:
    short = Clients("bob", "sk-bob", rate=2.0, words=(20, 60), tokens=(8, 24))
    yield offer("bob alone", short)
    yield offer("others as usual", short, Clients("ann", "sk-ann", at_once=32))
    yield offer("ann floods", short, Clients("ann", "sk-ann", rate=20.0, words=(1200, 1800), num_retries=2))


def _pool(offer: Callable[..., dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield offer("overload", Clients("clients", rate=100.0))
    yield offer("long answers", Clients("clients", rate=30.0, words=(20, 60), tokens=(200, 400)))


_SCENARIOS: dict[str, tuple[Callable[..., Iterator[dict[str, Any]]], tuple[str, ...]]] = {
    "overload": (_overload, ()),
    "flood": (_flood, ("--api-key-file", "KEYS")),
    "pool": (_pool, ("--kv-cache-bytes", "96MiB", "--max-model-len", "2048")),
}
_COUNTERS = ("generation_tokens_total", "num_preemptions_total", "recomputed_tokens_total")


def measure(checkout: Path, scenario: str, only: str, flags: tuple[str, ...]) -> list[dict[str, Any]]:
    """One round: what clients, probe and kernel saw in each phase.

    Raises:
        ServerError: the server does not start.
    """
    phases, own_flags = _SCENARIOS[scenario]
    key = "sk-bob" if scenario == "flood" else None
    with tempfile.TemporaryDirectory() as logs:
        keys = Path(logs) / "keys"
        keys.write_text("bob:sk-bob\nann:sk-ann\n")
        keys.chmod(0o600)
        own_flags = tuple(str(keys) if flag == "KEYS" else flag for flag in own_flags)
        process = ServerProcess(server(checkout, (*own_flags, *flags)), Path(logs) / "log", api_key=key)
        with process:
            target = Target("127.0.0.1", process.port, api_key=key)

            def offer(name: str, *kinds: Clients) -> dict[str, Any]:
                if only not in name and name != "saturation":  # which says how much the others offer
                    return {}
                found = _offer(process, target, name, kinds, seed=f"{time.time()}")
                print(json.dumps(found), file=sys.stderr, flush=True)
                return found

            return [found for found in phases(offer) if found]


def _offer(
    process: ServerProcess, target: Target, name: str, kinds: tuple[Clients, ...], seed: str
) -> dict[str, Any]:
    probes: list[subprocess.Popen[str]] = []
    times: list[dict[str, tuple[float, float]]] = []

    def look() -> None:
        times.append(process.times())

    def begin() -> None:
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.health_probe",
            str(process.port),
            str(_WINDOW_S - 1),
        ]
        probes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT))
        look()

    before = {counter: process.metric(counter) for counter in _COUNTERS}
    load = run(
        target,
        process.model,
        kinds,
        ramp=_RAMP_S,
        window=_WINDOW_S,
        seed=seed,
        at_begin=begin,
        at_end=look,
    )
    health = json.loads(probes[0].communicate()[0])
    counters = {counter: process.metric(counter) - before[counter] for counter in _COUNTERS}
    while process.metric("num_requests_running") or process.metric("num_requests_waiting"):
        time.sleep(0.1)
    cores, waiting = (
        {part: (times[1][part][i] - times[0][part][i]) / _WINDOW_S for part in times[0]} for i in (0, 1)
    )
    return {
        "phase": name,
        "kinds": [kind.name for kind in kinds],
        **load.figures,
        "health_ms": percentiles(1000 * seconds for seconds in health),
        "client_cores": load.client_cores,
        "counters": counters,
        "cores": cores,
        "waiting": waiting,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a server that is overloaded.")
    parser.add_argument("file", type=Path, help="records, a JSON object a line")
    parser.add_argument("--checkout", default=f"this={_ROOT}", metavar="NAME=DIR")
    parser.add_argument("--scenario", choices=list(_SCENARIOS), default="overload")
    parser.add_argument("--only", default="", help="the first phase, and those whose name contains this")
    parser.add_argument("--flags", default="", help="further flags of inflightd serve")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the medians")
    return parser.parse_args()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no server behind
    arguments = _parse()
    if not arguments.table:
        name, _, checkout = arguments.checkout.partition("=")
        phases = measure(
            Path(checkout).resolve(), arguments.scenario, arguments.only, tuple(arguments.flags.split())
        )
        record = {"name": name, "scenario": arguments.scenario, "time": time.time(), "phases": phases}
        with arguments.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
    lines = arguments.file.read_text().splitlines()
    records = [record for line in lines if (record := json.loads(line))["scenario"] == arguments.scenario]
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
