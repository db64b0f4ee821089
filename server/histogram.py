"""Histograms as Prometheus knows them, and the bucket bounds that more than one place uses."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

# vLLM's, for the tokens of one step.
STEP_TOKENS_BUCKETS = (
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
)  # fmt: skip


def one_two_five_buckets(largest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to ``largest``, as vLLM counts tokens."""
    steps = (mantissa * 10**exponent for exponent in range(len(str(largest))) for mantissa in (1, 2, 5))
    return tuple(float(step) for step in steps if step <= largest)


class Histogram:
    """Counts of values by bucket. Not thread-safe."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """(upper bound, values up to it) for each bucket, and the sum of the values."""
        bounds = [str(bound) for bound in self._bounds] + ["+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), self._sum
