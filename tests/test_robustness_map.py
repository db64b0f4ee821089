"""The page about robustness names tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

_TESTS = Path(__file__).parent
_PAGE = _TESTS.parent / "docs" / "robustness.md"


@cache
def _functions(file: Path) -> frozenset[str]:
    tree = ast.parse(file.read_text())
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_named_test_exists() -> None:
    named = re.findall(r"`([\w/]+)::(\w+)`", _PAGE.read_text())
    assert len(named) > 100
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (path := _TESTS / f"{file}.py").is_file() or test not in _functions(path)
    ]
    assert missing == []


def test_every_row_names_a_test() -> None:
    rows = [line for line in _PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [row for row in rows if not row.startswith(("|---", "| what comes", "| fault |", "| test |"))]
    assert [row for row in rows if "::test_" not in row] == []
