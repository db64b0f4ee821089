from __future__ import annotations

import io
import time

import pytest

from scheduler.hashing_executor import HashingExecutor
from server.console import Console
from server.transport import Progress, Ready

READY = Ready(HashingExecutor(8, 4).spec, "a plan", 1.0)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")


def _shown(stream: io.StringIO) -> str:
    console = Console("model", "http://127.0.0.1:8000", time.monotonic(), stream)
    for done in (0, 1, 4):
        console.show_progress(Progress("weights", done, 4))
    console.show_ready(READY)
    return stream.getvalue()


def test_a_terminal_sees_a_bar_grow() -> None:
    bars = _shown(_Terminal()).split("\r")
    assert [bar.count("█") for bar in bars[1:4]] == [0, 7, 30]
    assert [bar.split(" ")[-3:] for bar in bars[1:3]] == [["0", "of", "4"], ["1", "of", "4"]]
    assert "4 of 4\n" in bars[3]


def test_a_log_gets_lines_of_a_stage_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = io.StringIO(), 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console("model", "http://127.0.0.1:8000", now, log)
    for done in range(9):
        console.show_progress(Progress("kernels", done, 8))
        now += 1.1
    assert log.getvalue().splitlines() == [
        "kernels: 2 of 8", "kernels: 4 of 8", "kernels: 6 of 8", "kernels: done"
    ]  # fmt: skip


def test_a_log_gets_one_line_of_a_stage_that_does_not() -> None:
    assert _shown(io.StringIO()).startswith("weights: done\n\na plan\n\nServing model on none (hashes) at ")


def test_the_curl_line_names_model_and_address() -> None:
    curl = _shown(io.StringIO()).splitlines()[-1]
    assert curl.startswith("curl http://127.0.0.1:8000/v1/chat/completions ")
    assert '"model": "model"' in curl


@pytest.mark.parametrize("isatty", [True, False])
def test_a_terminal_that_is_gone_is_no_failure(isatty: bool) -> None:
    gone = _Gone()
    gone.isatty = lambda: isatty  # type: ignore[method-assign]
    assert _shown(gone) == ""
