"""The metrics of several API processes as one page: each number is the sum over them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

# What is no sum, and of no process in particular.
_LEFT_OUT = frozenset({"process_start_time_seconds", "process_max_fds", "python_info"})


class _Sample(msgspec.Struct, array_like=True):
    name: str
    labels: dict[str, str]
    value: float


class Part(msgspec.Struct, array_like=True):
    """A metric of one process, with its samples."""

    name: str
    documentation: str
    type: str
    samples: list[_Sample]


_decoder = msgspec.msgpack.Decoder(list[Part])


def encoded_parts(families: Iterable[Metric]) -> bytes:
    """What one process adds to the page of all."""
    parts = [
        Part(
            family.name,
            family.documentation,
            family.type,
            [_Sample(sample.name, sample.labels, sample.value) for sample in family.samples],
        )
        for family in families
        if family.name not in _LEFT_OUT
    ]
    return msgspec.msgpack.encode(parts)


def kept_parts(parts: bytes) -> bytes:
    """What stays when the process is gone: counts do not go back, what it had running has ended."""
    kept = [part for part in _decoder.decode(parts) if part.type in ("counter", "histogram")]
    return msgspec.msgpack.encode(kept)


def summed_parts(first: bytes, second: bytes) -> bytes:
    return encoded_parts(_sum((first, second)))


def page(parts: Iterable[bytes]) -> bytes:
    """The ``encoded_parts`` of several processes in Prometheus' text format 0.0.4."""
    return generate_latest(_Summed(_sum(parts)))


def _sum(parts: Iterable[bytes]) -> list[Metric]:
    families: dict[str, Metric] = {}
    places: dict[tuple[str, ...], int] = {}
    for encoded in parts:
        for part in _decoder.decode(encoded):
            family = families.get(part.name)
            if family is None:
                family = families[part.name] = Metric(part.name, part.documentation, part.type)
            for sample in part.samples:
                labels = (f"{name}={value}" for name, value in sorted(sample.labels.items()))
                key = (part.name, sample.name, *labels)
                if key in places:
                    before = family.samples[places[key]]
                    family.samples[places[key]] = before._replace(value=before.value + sample.value)
                else:
                    places[key] = len(family.samples)
                    family.add_sample(sample.name, sample.labels, sample.value)
    return list(families.values())


class _Summed(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
