"""The flags of ``inflightd bench``. Imports little, since every command makes them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.bench.workload import PATHS

_HELP = """\
Sends streamed requests to a running server, any that speaks OpenAI's API, and reports tokens a second and
percentiles of the time to the first token (TTFT), the time a token after it (TPOT) and of whole requests."""

_EXAMPLES = """\
examples:
  inflightd bench serve --concurrency 1,8,32             closed loops: so many requests at a time
  inflightd bench serve --rate 2,4,8 --requests 200      open loops: requests a second, Poisson arrivals
  inflightd bench serve --prompts prompts.jsonl --json figures.json --plot figures.svg
  inflightd bench serve --url https://host/base --endpoint chat --no-ignore-eos     another server"""

_THROUGHPUT_HELP = """\
Sends many requests at once and reports how much was done in all: requests and tokens a second."""

_THROUGHPUT_EXAMPLES = """\
examples:
  inflightd bench throughput                                   starts a server with the default model
  inflightd bench throughput -- model.gguf --max-num-seqs 64   starts one with these flags
  inflightd bench throughput --url http://127.0.0.1:8000 --requests 500 --concurrency 200"""

_LATENCY_HELP = """\
Sends one request after the other and reports times: to the first token (TTFT), between tokens (ITL), a token
(TPOT) and of whole answers."""

_LATENCY_EXAMPLES = """\
examples:
  inflightd bench latency --prompt-words 512
  inflightd bench latency --url http://127.0.0.1:8000 --json figures.json"""

_STARTUP_HELP = """\
Starts a server a few times and reports how long it takes until it is ready and until its first token, and the
memory of its processes."""

_STARTUP_EXAMPLES = """\
examples:
  inflightd bench startup --runs 5
  inflightd bench startup -- model.gguf --max-model-len 4096"""


def _numbers(kind: Callable[[str], Any], minimum: float) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: give numbers with commas between them") from None
        if not all(minimum <= value < float("inf") for value in values):
            raise argparse.ArgumentTypeError(f"{text!r}: each must be at least {minimum}")
        return values

    return parse


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r}: it must be at least {minimum}")
        return value

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return value


def _file(*endings: str) -> Callable[[str], Path]:
    """A file that can be written, which is better known before a load than behind it."""

    def parse(text: str) -> Path:
        path = Path(text)
        if endings and path.suffix not in endings:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(endings)}")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
        return path

    return parse


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measures servers."
    kinds = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    serve = _kind(kinds, "serve", "load on a running server", _HELP, _EXAMPLES)
    serve.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    load = serve.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=_numbers(int, 1), default=(1, 8, 32), metavar="N[,N]",
                      help="requests at a time, one load each (default: 1,8,32)")  # fmt: skip
    load.add_argument("--rate", type=_numbers(float, 0.001), metavar="R[,R]",
                      help="requests a second instead, at random times (Poisson)")  # fmt: skip
    _add_workload(serve, "of each load (default: 8, or 4 for each at a time; 30 s of a rate)")
    throughput = _kind(
        kinds, "throughput", "how much a server gets done", _THROUGHPUT_HELP, _THROUGHPUT_EXAMPLES
    )
    throughput.add_argument("--concurrency", type=_at_least(1), metavar="N",
                            help="requests at a time (default: all)")  # fmt: skip
    latency = _kind(
        kinds, "latency", "how long one request takes that is alone", _LATENCY_HELP, _LATENCY_EXAMPLES
    )
    for kind, default in ((throughput, 128), (latency, 20)):
        kind.add_argument("--url", help="of a server that runs (default: one is started)")
        _add_workload(kind, f"in all (default: {default})")
        _add_flags(kind)
    startup = _kind(kinds, "startup", "how long a server takes to start", _STARTUP_HELP, _STARTUP_EXAMPLES)
    startup.add_argument("--runs", type=_at_least(1), default=3, metavar="N", help="(default: %(default)s)")
    startup.add_argument("--api-key", metavar="KEY", help="of the server; better in INFLIGHTD_API_KEY")
    startup.add_argument("--json", type=_file(), metavar="FILE", help="write all figures there")
    _add_flags(startup)


def _kind(kinds: Any, name: str, help: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        name,
        help=help,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS",
                        help="of inflightd serve, behind --, for the server that is started")  # fmt: skip


def _add_workload(parser: argparse.ArgumentParser, requests: str) -> None:
    add = parser.add_argument
    add("--model", help="one of the names that the server serves (default: its first)")
    add("--api-key", metavar="KEY", help="of the server; better in INFLIGHTD_API_KEY")
    add("--endpoint", choices=sorted(PATHS), default="completions", help="(default: %(default)s)")
    add("--requests", type=_at_least(1), metavar="N", help=requests)
    add("--prompt-words", type=_at_least(2), default=128, metavar="N",
        help="of random prompts; a word is about a token (default: %(default)s)")  # fmt: skip
    add("--shared-prefix-words", type=_at_least(0), default=0, metavar="N",
        help="that all prompts begin with, on top (default: %(default)s)")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE",
        help='prompts instead of random ones: a line each, or {"prompt": ...} in a .jsonl file')  # fmt: skip
    add("--output-tokens", type=_at_least(1), default=128, metavar="N", help="(default: %(default)s)")
    add("--temperature", type=_temperature, default=0.0, help="(default: %(default)s)")
    add(
        "--no-ignore-eos", action="store_true", help="let answers end by themselves; plain OpenAI fields only"
    )
    add("--seed", default="0", help="of prompts and arrivals (default: %(default)s)")
    add(
        "--timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="for one request (default: %(default)s)",
    )
    add("--json", type=_file(), metavar="FILE", help="write all figures there")
    add("--plot", type=_file(".svg"), metavar="FILE.svg", help="draw latency against load there")
