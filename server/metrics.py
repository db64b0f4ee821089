"""Prometheus metrics with vLLM's names, labels and buckets, under a prefix of the operator's choice.

The values live in plain numbers that only the event loop touches; they become Prometheus samples when
somebody scrapes. So a token costs a few additions and a binary search, and no client can make up labels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from scheduler.messages import EngineOutput, FinishReason, Request
from server.admission import Admission
from server.api_keys import cache_scope
from server.engine_protocol import NO_ENGINE, EngineClient
from server.errors import EngineDeadError
from server.fields import Path
from server.grammar_check import GrammarCheck
from server.histogram import Histogram, one_two_five_buckets
from server.logs import log_request
from server.metric_parts import encoded_parts
from server.operation_metrics import OperationMetrics
from server.request_trace import SequenceTimes, request_trace

_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
_N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)

_FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_MAX_FIELD_NAMES = 32


class Metrics(Collector):
    """All metrics of one API process. ``text()`` is the page that Prometheus scrapes."""

    def __init__(
        self,
        prefix: str,
        model_name: str,
        engine: EngineClient,
        admission: Admission,
    ) -> None:
        """
        Args:
            prefix: before the colon of every name.
            model_name: the value of the label of that name.
        """
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": "0"}
        self._engine = engine
        self._admission = admission
        self.grammar_check: GrammarCheck | None = None
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[FinishReason] = Counter(dict.fromkeys(FinishReason, 0))
        self._unknown_fields: Counter[str] = Counter()
        self.time_to_first_token = Histogram(_TTFT_BUCKETS)
        self.inter_token_latency = Histogram(_TOKEN_BUCKETS)
        self.time_per_output_token = Histogram(_TOKEN_BUCKETS)
        self.e2e_latency = Histogram(_REQUEST_BUCKETS)
        self.queue_time = Histogram(_REQUEST_BUCKETS)
        self.inference_time = Histogram(_REQUEST_BUCKETS)
        self.prefill_time = Histogram(_REQUEST_BUCKETS)
        self.decode_time = Histogram(_REQUEST_BUCKETS)
        self.params_n = Histogram(_N_BUCKETS)
        # The bounds depend on the context, which is known once the engine is ready.
        self.token_counts: dict[str, Histogram] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.operation = OperationMetrics(prefix, self._labels, engine, admission)
        self._registry.register(self.operation)
        ProcessCollector(registry=self._registry)

    def register(self, collector: Collector) -> None:
        """Has the page show more."""
        self._registry.register(collector)

    @property
    def num_waiting(self) -> int:
        """Requests in the line and those that the engine has no room for."""
        return self._admission.num_waiting + self._engine.stats.num_waiting

    @property
    def num_running(self) -> int:
        return self._engine.stats.num_running

    def count_unknown_field(self, path: Path) -> None:
        """The first few plain names are told apart, all others are one."""
        name = str(path[-1])
        if name not in self._unknown_fields and (
            len(self._unknown_fields) >= _MAX_FIELD_NAMES or not _FIELD_NAME.fullmatch(name)
        ):
            name = "other"
        self._unknown_fields[name] += 1

    def observe_tokens(self, name: str, value: int) -> None:
        """Counts a number of tokens in one of the histograms ``request_*tokens``."""
        histogram = self.token_counts.get(name)
        if histogram is None:
            bounds = one_two_five_buckets(self._engine.spec.max_model_len)
            histogram = self.token_counts[name] = Histogram(bounds)
        histogram.observe(value)

    def count_finished(self, reason: FinishReason) -> None:
        self.finished[reason] += 1

    def part(self, *, with_engine: bool) -> bytes:
        """The same for ``metric_parts.page``, where several processes have one engine, and one of them tells
        what the engine counts."""
        engine = self._engine
        if not with_engine:
            self._engine = self.operation.engine = NO_ENGINE
        try:
            return encoded_parts(self._registry.collect())
        finally:
            self._engine = self.operation.engine = engine

    def text(self) -> bytes:
        """In Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield self._gauge("num_requests_running", "Requests in the running batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests waiting to be scheduled.", self.num_waiting)
        yield self._gauge(
            "kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.", stats.kv_cache_usage
        )
        yield self._counter(
            "prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_cache_queries_total
        )
        yield self._counter(
            "prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_cache_hits_total
        )
        yield self._counter(
            "num_preemptions", "Preemptions since the engine started.", stats.preemptions_total
        )
        yield self._counter(
            "prompt_tokens", "Prompt tokens of requests that began to answer.", self.prompt_tokens
        )
        yield self._counter("generation_tokens", "Generated tokens.", self.generation_tokens)
        check = self.grammar_check
        yield self._counter(
            "grammar_compilations",
            "Grammars of requests that were compiled to check them.",
            check.num_compiled if check else 0,
        )
        yield self._counter(
            "grammar_refusals",
            "Grammars of requests that turned out to be wrong or too complex.",
            check.num_refused if check else 0,
        )
        yield self._success()
        yield self._unknown()
        for name, histogram, help_text in (
            ("time_to_first_token_seconds", self.time_to_first_token, "From arrival to the first token."),
            ("inter_token_latency_seconds", self.inter_token_latency, "Between two tokens of a request."),
            (
                "request_time_per_output_token_seconds",
                self.time_per_output_token,
                "Mean time between the tokens of a finished request.",
            ),
            ("e2e_request_latency_seconds", self.e2e_latency, "From arrival to the last token."),
            ("request_queue_time_seconds", self.queue_time, "From arrival to the first step."),
            ("request_inference_time_seconds", self.inference_time, "From the first step to the last token."),
            ("request_prefill_time_seconds", self.prefill_time, "From the first step to the first token."),
            ("request_decode_time_seconds", self.decode_time, "From the first token to the last."),
            ("request_params_n", self.params_n, "Choices asked for by a request."),
            ("iteration_tokens_total", self._engine.step_tokens, "Tokens computed in one step."),
            *((name, histogram, "Tokens of a request.") for name, histogram in self.token_counts.items()),
        ):
            yield self._histogram(name, histogram, help_text)
        yield from self._cache_config()

    def _name(self, name: str) -> str:
        return f"{self._prefix}:{name}"

    def _gauge(self, name: str, help_text: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._name(name), help_text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, help_text: str, value: float) -> Metric:
        family = CounterMetricFamily(self._name(name), help_text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _histogram(self, name: str, histogram: Histogram, help_text: str) -> Metric:
        family = HistogramMetricFamily(self._name(name), help_text, labels=list(self._labels))
        buckets, total = histogram.cumulative()
        family.add_metric(list(self._labels.values()), buckets, total)
        return family

    def _success(self) -> Metric:
        family = CounterMetricFamily(
            self._name("request_success"),
            "Requests that ended, by reason.",
            labels=[*self._labels, "finished_reason"],
        )
        for reason, count in self.finished.items():
            family.add_metric([*self._labels.values(), reason.value], count)
        return family

    def _unknown(self) -> Metric:
        family = CounterMetricFamily(
            self._name("request_unknown_fields"),
            "Fields of request bodies that nobody knows.",
            labels=["field"],
        )
        for name, count in self._unknown_fields.items():
            family.add_metric([name], count)
        return family

    def _cache_config(self) -> Iterator[Metric]:
        try:
            spec = self._engine.spec
        except EngineDeadError:
            return
        labels = {
            "block_size": str(spec.block_size),
            "num_gpu_blocks": str(spec.num_blocks),
            "enable_prefix_caching": "True",
            "engine": self._labels["engine"],
        }
        family = GaugeMetricFamily(
            self._name("cache_config_info"), "Settings of the KV cache, in the labels.", labels=list(labels)
        )
        family.add_metric(list(labels.values()), 1)
        yield family


class RequestTimer:
    """Watches one request from arrival to end; tells the metrics, the log and the trace."""

    __slots__ = (
        "_first_token", "_is_finished", "_last_token", "_metrics", "_num_cached_tokens", "_num_tokens",
        "_request", "_scheduled", "_trace",
    )  # fmt: skip

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self._metrics = metrics
        self._request = request
        self._trace = request_trace.get()
        self._scheduled = 0.0
        self._first_token = 0.0
        self._last_token = 0.0
        self._num_tokens = 0
        self._num_cached_tokens = 0
        self._is_finished = False

    def observe(self, output: EngineOutput, now: float) -> None:
        """Takes the tokens of a step, which arrived at ``now`` (``time.monotonic()``)."""
        count = len(output.token_ids)
        if not count:
            self._scheduled = self._scheduled or output.first_scheduled_time
            return
        metrics = self._metrics
        metrics.generation_tokens += count
        self._num_tokens += count
        if self._first_token:
            metrics.inter_token_latency.observe((now - self._last_token) / count, count)
        else:
            self._first_token = now
            self._scheduled = output.first_scheduled_time
            self._num_cached_tokens = output.num_cached_tokens
            metrics.prompt_tokens += len(self._request.prompt_token_ids)
            metrics.time_to_first_token.observe(now - self._request.arrival_time)
        self._last_token = now

    def finish(self, reason: FinishReason, now: float) -> None:
        """Ends the watch, once. What ended before its first token is counted, but has no times."""
        if self._is_finished:
            return
        self._is_finished = True
        metrics, arrival = self._metrics, self._request.arrival_time
        metrics.count_finished(reason)
        metrics.e2e_latency.observe(now - arrival)
        metrics.observe_tokens("request_prompt_tokens", len(self._request.prompt_token_ids))
        metrics.observe_tokens("request_generation_tokens", self._num_tokens)
        metrics.observe_tokens("request_params_max_tokens", self._request.params.max_tokens)
        # A clock is one for all processes of a machine, but not finer than its tick.
        scheduled = max(self._scheduled, arrival)
        log_request(
            request=self._request.request_id,
            key=cache_scope.get(),
            finish_reason=reason.value,
            prompt_tokens=len(self._request.prompt_token_ids),
            generated_tokens=self._num_tokens,
            queue_seconds=round(scheduled - arrival, 4) if self._first_token else None,
            first_token_seconds=round(self._first_token - arrival, 4) if self._first_token else None,
            total_seconds=round(now - arrival, 4),
        )
        if self._trace is not None:
            self._trace.add(
                SequenceTimes(
                    self._request,
                    reason,
                    self._num_tokens,
                    self._num_cached_tokens,
                    self._scheduled,
                    self._first_token,
                    self._last_token,
                    now,
                )
            )
        if not self._first_token:
            return
        metrics.queue_time.observe(scheduled - arrival)
        metrics.prefill_time.observe(max(self._first_token - scheduled, 0.0))
        metrics.decode_time.observe(self._last_token - self._first_token)
        metrics.inference_time.observe(max(self._last_token - scheduled, 0.0))
        if self._num_tokens > 1:
            metrics.time_per_output_token.observe(
                (self._last_token - self._first_token) / (self._num_tokens - 1)
            )
