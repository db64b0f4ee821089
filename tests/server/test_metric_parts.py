from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from server.metric_parts import encoded_parts, kept_parts, page, summed_parts


def registry(count: int, running: int, seconds: float, *, other: bool = False) -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("tokens", "Tokens.", ["kind"], registry=made).labels("a").inc(count)
    Gauge("running", "Running.", registry=made).set(running)
    Histogram("took", "Seconds.", buckets=(1, 2), registry=made).observe(seconds)
    Gauge("process_start_time_seconds", "Start.", registry=made).set(1e9)
    if other:
        Counter("odd", "What one process alone has.", registry=made).inc()
    return made


def values(text: bytes) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_a_page_is_the_sum_of_its_parts() -> None:
    parts = [
        encoded_parts(registry(3, 1, 0.5).collect()),
        encoded_parts(registry(4, 2, 1.5, other=True).collect()),
    ]
    assert values(page(parts)) == {
        ("tokens_total", "a"): 7,
        ("running",): 3,
        ("took_bucket", "1.0"): 1,
        ("took_bucket", "2.0"): 2,
        ("took_bucket", "+Inf"): 2,
        ("took_count",): 2,
        ("took_sum",): 2.0,
        ("odd_total",): 1,
    }


def test_of_a_process_that_is_gone_its_counts_stay() -> None:
    gone = [kept_parts(encoded_parts(registry(n, 5, 0.5).collect())) for n in (3, 4)]
    seen = values(page([summed_parts(*gone), encoded_parts(registry(1, 1, 3.0).collect())]))
    assert seen["tokens_total", "a"] == 8
    assert seen["running",] == 1
    assert seen["took_count",] == 3
    assert seen["took_sum",] == 4.0
