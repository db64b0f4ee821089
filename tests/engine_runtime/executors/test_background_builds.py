"""Engines are built in order of need, by a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install -e '.[gpu]'")

from engine_runtime.executors.tensorrt.background_builds import BackgroundBuilds, Parts, buckets_ready
from engine_runtime.executors.tensorrt.buckets import Buckets
from engine_runtime.executors.tensorrt.library import TensorRTError
from engine_runtime.models.segment import SegmentKind


class SlowEngines:
    """Builds one engine for each ``go``; those of ``broken`` token counts fail."""

    def __init__(self, ready: Sequence[int] = (), broken: Sequence[int] = ()) -> None:
        self.built: list[tuple[SegmentKind, int]] = []
        self.go = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self._ready = ready
        self._broken = broken

    def is_ready(self, kind: SegmentKind, num_tokens: int) -> bool:
        return num_tokens in self._ready or (kind, num_tokens) in self.built

    def prepare(self, kind: SegmentKind, num_tokens: int) -> None:
        self.begun.release()
        assert self.go.acquire(timeout=10)
        if num_tokens in self._broken:
            raise TensorRTError("no such engine")
        self.built.append((kind, num_tokens))


def _body(engines: SlowEngines) -> Parts:
    return [(engines, "first"), (engines, "middle")]


def test_nothing_is_missing_where_kernels_compute() -> None:
    engines = SlowEngines(ready=(1, 2, 4))
    buckets = buckets_ready(_body(engines), (1, 2, 4))
    assert buckets.missing == []
    builds = BackgroundBuilds([(buckets, _body(engines))], lambda: None)
    builds.wait()
    builds.close()
    assert engines.built == []


def test_what_steps_ask_for_comes_first() -> None:
    engines = SlowEngines(ready=(64,))
    buckets = buckets_ready(_body(engines), (1, 2, 4, 8, 64))
    threads: list[str] = []
    builds = BackgroundBuilds(
        [(buckets, _body(engines))], lambda: threads.append(threading.current_thread().name)
    )
    assert engines.begun.acquire(timeout=10)  # the smallest: nobody has asked yet
    assert [buckets.choose(7) for _ in range(3)] == [64, 64, 64]
    assert buckets.choose(2) == 64
    engines.go.release(100)
    builds.wait()
    assert [num_tokens for kind, num_tokens in engines.built if kind == "first"] == [1, 8, 2, 4]
    assert [kind for kind, num_tokens in engines.built if num_tokens == 8] == ["first", "middle"]
    assert buckets.missing == []
    assert buckets.choose(7) == 8
    assert threads == ["build-engines"]


def test_an_engine_that_cannot_be_built_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    engines = SlowEngines(ready=(64,), broken=(2,))
    buckets = buckets_ready(_body(engines), (1, 2, 4, 64))
    engines.go.release(100)
    builds = BackgroundBuilds([(buckets, _body(engines))], lambda: None)
    builds.wait()
    assert [bucket for _, bucket in buckets.missing] == [2]
    assert buckets.choose(2) == 4
    assert "steps of 2 tokens are padded to the next size: no such engine" in caplog.text


def test_closing_waits_for_one_engine_only() -> None:
    engines = SlowEngines(ready=(64,))
    buckets = buckets_ready([(engines, "middle")], (1, 2, 4, 64))
    builds = BackgroundBuilds([(buckets, [(engines, "middle")])], lambda: None)
    assert engines.begun.acquire(timeout=10)
    threading.Timer(0.05, engines.go.release, (100,)).start()
    builds.close()
    assert engines.built == [("middle", 1)]


def test_two_rows_of_buckets_share_the_thread() -> None:
    engines = SlowEngines(ready=(8, 64))
    rows, tokens = Buckets((1, 8), missing=(1,)), Buckets((16, 64), missing=(16,))
    tokens.choose(5)
    engines.go.release(100)
    wanted: list[tuple[Buckets, Parts]] = [(rows, [(engines, "last")]), (tokens, [(engines, "middle")])]
    BackgroundBuilds(wanted, lambda: None).wait()
    assert engines.built == [("middle", 16), ("last", 1)]
