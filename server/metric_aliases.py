"""Our metrics under the names of others: OpenTelemetry's GenAI conventions, and Hugging Face TGI's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from scheduler.messages import FinishReason
from server.histogram import Histogram
from server.metrics import Metrics


def add_aliases(metrics: Metrics, model_name: str, compat: str | None) -> None:
    """Has the page show them too.

    Args:
        compat: ``tgi`` adds the names of that server.
    """
    metrics.register(GenAiMetrics(metrics, model_name))
    if compat == "tgi":
        metrics.register(TgiMetrics(metrics))


class GenAiMetrics(Collector):
    """The server metrics of OpenTelemetry's GenAI conventions, as its exporters name them for Prometheus."""

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        self._metrics = metrics
        self._labels = {
            "gen_ai_operation_name": "generate_content",
            "gen_ai_provider_name": "inflightd",
            "gen_ai_request_model": model_name,
        }

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        for name, histogram, help_text in (
            ("request_duration", metrics.e2e_latency, "From arrival to the last token."),
            ("time_to_first_token", metrics.time_to_first_token, "From arrival to the first token."),
            ("time_per_output_token", metrics.time_per_output_token, "Between the tokens of an answer."),
        ):
            yield _histogram(f"gen_ai_server_{name}_seconds", help_text, histogram, self._labels)


class TgiMetrics(Collector):
    """What dashboards made for TGI look for (``--metrics-compat tgi``)."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        finished = metrics.finished
        succeeded = finished[FinishReason.STOP] + finished[FinishReason.LENGTH]
        yield CounterMetricFamily("tgi_request_count", "Requests that ended.", sum(finished.values()))
        yield CounterMetricFamily("tgi_request_success", "Requests that were answered.", succeeded)
        yield CounterMetricFamily(
            "tgi_request_failure", "Requests that failed.", finished[FinishReason.ERROR]
        )
        yield GaugeMetricFamily("tgi_queue_size", "Requests waiting.", metrics.num_waiting)
        yield GaugeMetricFamily("tgi_batch_current_size", "Requests in the batch.", metrics.num_running)
        for name, histogram, help_text in (
            ("request_duration", metrics.e2e_latency, "From arrival to the last token."),
            ("request_queue_duration", metrics.queue_time, "From arrival to the first step."),
            ("request_inference_duration", metrics.inference_time, "From the first step to the last token."),
            ("request_mean_time_per_token_duration", metrics.time_per_output_token, "Between two tokens."),
        ):
            yield _histogram(f"tgi_{name}", help_text, histogram, {})
        for name, kind in (("input_length", "prompt"), ("generated_tokens", "generation")):
            counted = metrics.token_counts.get(f"request_{kind}_tokens")
            if counted is not None:
                yield _histogram(f"tgi_request_{name}", "Tokens of a request.", counted, {})


def _histogram(name: str, help_text: str, histogram: Histogram, labels: dict[str, str]) -> Metric:
    family = HistogramMetricFamily(name, help_text, labels=list(labels))
    buckets, total = histogram.cumulative()
    family.add_metric(list(labels.values()), buckets, total)
    return family
