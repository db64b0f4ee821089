from __future__ import annotations

import threading
import time

import pytest

from server.time_limit import TimeLimit, TimeLimitError


def test_what_is_quick_is_left_alone() -> None:
    for _ in range(1000):
        with TimeLimit(0.2):
            pass
    time.sleep(0.6)  # what is over cannot be late


def test_each_thread_has_its_own() -> None:
    ended: dict[str, str] = {}

    def work(name: str, limit: float) -> None:
        try:
            with TimeLimit(limit):
                until = time.monotonic() + 1.0
                while time.monotonic() < until:
                    pass
            ended[name] = "done"
        except TimeLimitError:
            ended[name] = "late"

    threads = [threading.Thread(target=work, args=args) for args in (("short", 0.2), ("long", 30.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == {"short": "late", "long": "done"}


def test_the_error_does_not_strike_behind_the_block() -> None:
    for _ in range(2):
        with pytest.raises(TimeLimitError), TimeLimit(0.01):
            time.sleep(0.4)  # over when the limit is noticed
        sum(range(10_000))
