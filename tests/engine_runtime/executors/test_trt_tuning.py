"""What is timed at the first start and what is not; tests/gpu/test_segments.py times real kernels."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install -e '.[gpu]'")

from engine_runtime.executors.tensorrt.kernel_segment import UnsupportedSegmentError
from engine_runtime.executors.tensorrt.tuning import TuningSpace, tune, tuned_counts
from engine_runtime.models.segment import SegmentKind

_SPACE = TuningSpace({"middle": [{"x": i} for i in range(5)], "last": [{"x": 9}]}, (256, 1000))


class TimedSegments:
    """Remembers what was timed, and how many layers at a time."""

    def __init__(self, known: Sequence[tuple[SegmentKind, int]] = ()) -> None:
        self.known = set(known)
        self.timed: list[tuple[SegmentKind, int, int]] = []
        self.unsupported: set[tuple[SegmentKind, int]] = set()
        self.unready: set[tuple[SegmentKind, int]] = set()

    def known_tactic(self, kind: SegmentKind, num_tokens: int) -> object | None:
        return object() if (kind, num_tokens) in self.known else None

    def is_ready(self, kind: SegmentKind, num_tokens: int) -> bool:
        return (kind, num_tokens) not in self.unready

    def tune(
        self,
        kind: SegmentKind,
        num_tokens: int,
        layers: Sequence[Mapping[str, int]],
        workspace: tuple[int, int],
        stream: Any,
        *,
        with_tensorrt: bool,
    ) -> None:
        assert not with_tensorrt
        assert workspace == _SPACE.workspace
        if (kind, num_tokens) in self.unsupported:
            raise UnsupportedSegmentError("no kernel")
        self.timed.append((kind, num_tokens, len(layers)))


def run(
    segments: TimedSegments,
    counts: Sequence[tuple[SegmentKind, int]],
    space: TuningSpace = _SPACE,
    seconds: float = 60.0,
) -> list[tuple[int, int]]:
    reports: list[tuple[int, int]] = []
    made: Any = segments
    nothing: Any = None
    deadline = time.monotonic() + seconds
    tune(made, counts, space, nothing, deadline, lambda done, size: reports.append((done, size)))
    return reports


def test_decode_steps_come_first_then_some_prompts() -> None:
    counts = tuned_counts((1, 8, 512), (16, 64, 512, 640, 1024, 3000))
    assert counts == [
        ("middle", 1), ("last", 1), ("middle", 8), ("last", 8), ("middle", 512), ("last", 512),
        ("middle", 1024), ("middle", 3000),
    ]  # fmt: skip


def test_what_is_known_is_not_timed_again() -> None:
    segments = TimedSegments(known=[("middle", 1), ("last", 1)])
    segments.unready = {("middle", 4)}
    counts: list[tuple[SegmentKind, int]] = [
        ("middle", 1),
        ("last", 1),
        ("middle", 2),
        ("middle", 4),
        ("last", 4),
    ]
    assert run(segments, counts) == [(0, 2), (1, 2), (2, 2)]
    assert segments.timed == [("middle", 2, 5), ("last", 4, 1)]
    assert run(TimedSegments(known=counts), counts) == []


def test_many_tokens_need_no_cold_weights() -> None:
    segments = TimedSegments()
    run(segments, [("middle", 256), ("middle", 1024)])
    assert segments.timed == [("middle", 256, 5), ("middle", 1024, 2)]


def test_what_kernels_cannot_compute_is_left_out() -> None:
    segments = TimedSegments()
    segments.unsupported = {("middle", 2)}
    assert run(segments, [("middle", 2), ("middle", 4)])[-1] == (2, 2)
    assert segments.timed == [("middle", 4, 5)]


def test_a_model_of_one_layer_has_no_middle() -> None:
    segments = TimedSegments()
    run(segments, [("middle", 1), ("last", 1)], TuningSpace({"middle": [], "last": [{"x": 1}]}, (256, 1000)))
    assert segments.timed == [("last", 1, 1)]


def test_the_time_is_limited() -> None:
    segments = TimedSegments()
    assert run(segments, [("middle", 1), ("middle", 2)], seconds=-1.0) == [(0, 2), (2, 2)]
    assert segments.timed == []
