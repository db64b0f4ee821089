from __future__ import annotations

import time
from multiprocessing.connection import Connection

import pytest

from tests.benchmarks.child_process import child_process


def test_one_that_says_what_nobody_reads_is_not_waited_for() -> None:
    with child_process(Connection.send, "x" * 2**22) as line:
        line.poll(10)
        began = time.monotonic()
    assert time.monotonic() - began < 5


def test_its_end_is_noticed() -> None:
    with child_process(Connection.close) as line, pytest.raises(EOFError):
        line.recv()
