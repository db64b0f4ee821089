from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as PrometheusHistogram

from server.histogram import Histogram, one_two_five_buckets


def test_a_histogram_counts_as_prometheus_own() -> None:
    bounds = [0.1, 1.0, 2.5]
    ours, theirs = (
        Histogram(bounds),
        PrometheusHistogram("h", "-", registry=CollectorRegistry(), buckets=bounds),
    )
    for value in (0.0, 0.1, 0.10001, 1.0, 2.0, 2.5, 2.6, 1e9):
        ours.observe(value)
        theirs.observe(value)
    samples = next(iter(theirs.collect())).samples
    buckets, total = ours.cumulative()
    assert buckets == [(s.labels["le"], s.value) for s in samples if s.name == "h_bucket"]
    assert total == next(s.value for s in samples if s.name == "h_sum")


@pytest.mark.parametrize(
    ("largest", "expected"), [(1, [1]), (4, [1, 2]), (10, [1, 2, 5, 10]), (150, [1, 2, 5, 10, 20, 50, 100])]
)
def test_one_two_five_buckets(largest: int, expected: list[int]) -> None:
    assert list(one_two_five_buckets(largest)) == expected
