"""The command line: ``inflightd serve``, ``chat``, ``bench`` and ``--version``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from server.bench.bench_arguments import add_bench_arguments
from server.config_sources import ConfigError, add_arguments, config_from, environment_variable, explained

_SERVE_HELP = """\
Serves a model over an OpenAI-compatible HTTP API.

Each flag can be given as an environment variable too: INFLIGHTD_PORT=9000 is --port 9000.
A flag on the command line wins."""

_EXAMPLES = """\
examples:
  inflightd serve                              the embedded default model, on http://127.0.0.1:8000
  inflightd serve model.gguf --port 9000       a GGUF file
  inflightd serve ./Llama-3.2-1B --dtype float32
  inflightd chat                               talk to a running server
  inflightd bench serve --concurrency 1,8,32   measure it"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status (2: wrong usage, 1: it could not run)."""
    parser = argparse.ArgumentParser(
        prog="inflightd",
        description="OpenAI-compatible serving daemon for large language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("inflightd")
    parser.add_argument("--version", action="version", version=f"inflightd {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description=_SERVE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(serve)
    chat = commands.add_parser("chat", help="talk to a running server in the terminal")
    chat.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    chat.add_argument("--model", help="one of the names that the server serves (default: its first)")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("--temperature", type=float, help="0 gives the most likely answer")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, in tokens")
    chat.add_argument(
        "--api-key", metavar="KEY", help="of the server; other users do not see it in INFLIGHTD_API_KEY"
    )
    bench = commands.add_parser("bench", help="measure a running server")
    add_bench_arguments(bench)
    parsed = parser.parse_args(arguments)
    try:
        if parsed.command == "serve":
            return _serve(parsed)
        # The variable may hold all keys of a server.
        api_key = parsed.api_key or os.environ.get(environment_variable("api_key"), "").partition(",")[0]
        if parsed.command == "bench":
            from server.bench.bench_command import run_bench

            return run_bench(parsed, api_key.strip() or None)
        from server.terminal_chat import run_chat

        return run_chat(
            parsed.url,
            parsed.model,
            parsed.system,
            parsed.temperature,
            parsed.max_tokens,
            api_key=api_key.strip(),
        )
    except KeyboardInterrupt:
        return 130


def _serve(parsed: argparse.Namespace) -> int:
    from server.launch import serve
    from server.listening import LaunchError
    from server.model_source import ModelSourceError

    try:
        config = config_from(parsed)
        serve(config, explained(parsed))
    except ConfigError as error:
        print(f"inflightd serve: {error}", file=sys.stderr)
        return 2
    except (LaunchError, ModelSourceError) as error:
        print(f"inflightd serve: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
