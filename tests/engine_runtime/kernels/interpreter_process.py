"""Tests of kernels in Triton's interpreter.

Triton decides when it is imported whether it interprets, so they run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
in_the_interpreter = pytest.mark.skipif(
    not _INTERPRETS, reason="runs in a process of its own: test_kernels_in_the_interpreter"
)
starts_the_interpreter = pytest.mark.skipif(
    _INTERPRETS or importlib.util.find_spec("triton") is None,
    reason="is the process that it would start" if _INTERPRETS else "Triton is not installed",
)


def check_interpreted(file: str | Path) -> None:
    """Runs what ``interpreted`` is part of the name of, class or file; none of it may be skipped."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(file), "-k", "interpreted"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
