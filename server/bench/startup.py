"""How long a server takes from nothing to its first token, and what it holds in memory then."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import httpx

from server.bench.own_server import OwnServer


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a server.

    Attributes:
        ready_seconds: from the start of its process until it takes requests.
        first_token_seconds: from the start of its process to the first token of a first request.
        ready_bytes, first_token_bytes: resident memory of its processes at these moments.
    """

    ready_seconds: float
    first_token_seconds: float
    ready_bytes: int
    first_token_bytes: int

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def measure_start(flags: Sequence[str], api_key: str | None) -> Start:
    """Starts a server, asks it for one token, and ends it.

    Raises:
        OwnServerError, httpx.HTTPError: it did not start, or did not answer.
    """
    with OwnServer(flags, api_key) as server:
        ready_bytes = server.resident_bytes()
        began = time.perf_counter()
        response = httpx.post(
            f"{server.url}/v1/completions",
            json={"prompt": "Hello", "max_tokens": 1, "temperature": 0},
            headers=server.headers,
            timeout=120.0,
        )
        response.raise_for_status()
        seconds = server.ready_seconds + time.perf_counter() - began
        return Start(server.ready_seconds, seconds, ready_bytes, server.resident_bytes())


_COLUMNS: tuple[tuple[str, Callable[[Start], str]], ...] = (
    ("ready s", lambda start: f"{start.ready_seconds:.2f}"),
    ("first token s", lambda start: f"{start.first_token_seconds:.2f}"),
    ("MiB when ready", lambda start: f"{start.ready_bytes / 2**20:.0f}"),
    ("MiB after the token", lambda start: f"{start.first_token_bytes / 2**20:.0f}"),
)


def startup_table(starts: Sequence[Start]) -> str:
    """A line for each start."""
    lines = ["start  " + "  ".join(name for name, _ in _COLUMNS)]
    for number, start in enumerate(starts, 1):
        cells = [cell(start).rjust(len(name)) for name, cell in _COLUMNS]
        lines.append(f"{number:>5}  " + "  ".join(cells))
    return "\n".join(lines)
