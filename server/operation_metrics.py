"""What an operator asks of the server itself: the line, refusals, restarts, wasted work, time of steps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.admission import Admission
from server.engine_protocol import EngineClient
from server.histogram import Histogram

_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LAG_EVERY_S = 1.0


class OperationMetrics(Collector):
    """Samples of parts that count for themselves. Every label has a fixed set of values."""

    def __init__(
        self, prefix: str, labels: dict[str, str], engine: EngineClient, admission: Admission
    ) -> None:
        self._prefix = prefix
        self._labels = labels
        self.engine = engine
        self._admission = admission
        self.loop_lag = Histogram(_LAG_BUCKETS)

    async def watch_loop(self) -> None:
        """Measures how late the event loop wakes a task, for ever."""
        now = asyncio.get_running_loop().time
        while True:
            due = now() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self.loop_lag.observe(max(0.0, now() - due))

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        stats, admission = self.engine.stats, self._admission
        waiting = {"admission": admission.num_waiting, "capacity": stats.num_waiting}
        yield self._gauge("num_requests_waiting_by_reason", "Where requests wait.", "reason", waiting)
        yield self._gauge(
            "queued_prompt_tokens", "Prompt tokens of the line.", None, {"": admission.num_waiting_tokens}
        )
        yield self._counter(
            "request_rejections", "Requests that were not taken.", "reason", dict(admission.rejections)
        )
        yield self._counter(
            "engine_restarts", "Engines that ended and were replaced.", None, {"": self.engine.num_restarts}
        )
        yield self._counter(
            "recomputed_tokens",
            "Tokens computed again after a preemption.",
            None,
            {"": stats.recomputed_tokens_total},
        )
        yield self._counter("engine_steps", "Steps since the engine started.", None, {"": stats.steps_total})
        times = {
            "schedule": stats.schedule_seconds_total,
            "execute": stats.execute_seconds_total,
            "update": stats.update_seconds_total,
        }
        yield self._counter("engine_step_seconds", "Time of the step loop.", "phase", times)
        family = HistogramMetricFamily(
            self._name("event_loop_lag_seconds"), "How late the event loop is.", labels=list(self._labels)
        )
        buckets, total = self.loop_lag.cumulative()
        family.add_metric(list(self._labels.values()), buckets, total)
        yield family

    def _name(self, name: str) -> str:
        return f"{self._prefix}:{name}"

    def _gauge(self, name: str, help_text: str, label: str | None, values: Mapping[str, float]) -> Metric:
        labels = [*self._labels, *([label] if label else [])]
        return self._filled(GaugeMetricFamily(self._name(name), help_text, labels=labels), label, values)

    def _counter(self, name: str, help_text: str, label: str | None, values: Mapping[str, float]) -> Metric:
        labels = [*self._labels, *([label] if label else [])]
        return self._filled(CounterMetricFamily(self._name(name), help_text, labels=labels), label, values)

    def _filled(
        self,
        family: GaugeMetricFamily | CounterMetricFamily,
        label: str | None,
        values: Mapping[str, float],
    ) -> Metric:
        for value, number in values.items():
            family.add_metric([*self._labels.values(), *([value] if label else [])], number)
        return family
