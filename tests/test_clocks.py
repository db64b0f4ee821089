"""Who reads which clock: a wall clock that jumps must not touch a timeout, a rate limit or a duration."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
# What a wall clock is for: dates that somebody reads, and the age of files.
_MAY_READ_WALL_CLOCK = {
    "engine_runtime/kernels/cpu_compile.py": "age of files",
    "server/chat_template.py": "strftime_now of templates",
    "server/response_database.py": "date of a response, kept over restarts",
    "server/responses_form.py": "created_at, completed_at",
    "server/service.py": "created of a model",
    "server/validation.py": "created of an answer",
    "server/tracing.py": "OpenTelemetry's times",
}
_WALL = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"}


def _reads_wall_clock(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if node.attr in _WALL and node.value.id in ("time", "datetime", "date") and name != "time.gmtime":
                return True
        if (
            isinstance(node, ast.ImportFrom)
            and node.module in ("time", "datetime")
            and any(alias.name in _WALL - {"gmtime"} for alias in node.names)
        ):
            return True
    return False


def test_only_dates_come_from_the_wall_clock() -> None:
    reading = {
        str(path.relative_to(_ROOT))
        for package in ("server", "scheduler", "engine_runtime")
        for path in (_ROOT / package).rglob("*.py")
        if _reads_wall_clock(path.read_text())
    }
    assert reading == set(_MAY_READ_WALL_CLOCK)


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        ("import time\ntime.time()", True),
        ("import time\nf = time.time_ns", True),
        ("from time import time", True),
        ("from datetime import datetime\ndatetime.now()", True),
        ("import time\ntime.monotonic()", False),
        ("import asyncio\nasyncio.get_running_loop().time()", False),
    ],
)
def test_the_search_finds_them(source: str, reads: bool) -> None:
    assert _reads_wall_clock(source) is reads
