"""Traces of requests by OpenTelemetry's SDK: one span a request, with children for queue, prefill, decode.

Imported only where traces are sent. Spans are put together when a request has ended, from times that are
taken anyway, so that a token costs nothing; they wait in a bounded queue and leave in batches by a thread.
If the collector is slow or gone, spans are lost and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import (
    SpanKind,
    Status,
    StatusCode,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scheduler.messages import FinishReason
from server.call import Call
from server.logs import trace_fields
from server.request_trace import SequenceTimes, request_trace

_log = logging.getLogger(__name__)

# What is traced: the paths on which something is generated, by the name of the operation in the conventions.
_OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/generate": "text_completion",
    "/generate_stream": "text_completion",
    "/": "text_completion",
    "/v1/embeddings": "embeddings",
}
# Of a call with many choices, so many get spans of their own.
_MAX_CHILDREN = 8
# How long the end of the server waits for the last spans to leave.
_CLOSE_S, _CLOSE_FAILING_S = 1.0, 0.2
CLIENT_DISCONNECTED = "client_disconnected"
_SDK_LOGS = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")


class Traces:
    """Where the spans of this process go.

    Args:
        processor: takes spans that have ended.
    """

    def __init__(self, processor: SpanProcessor, version: str) -> None:
        resource = Resource.create({"service.version": version})
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "inflightd"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer("inflightd", version)

    async def close(self) -> None:
        """Sends what waits, but not for long."""
        # Not awaited to its end: a collector that does not answer keeps the SDK for half a minute.
        closing = threading.Thread(target=self._provider.shutdown, name="close-traces", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, self._patience)

    @property
    def _patience(self) -> float:
        return _CLOSE_S


class OtlpTraces(Traces):
    """Sends to a collector over HTTP. Headers, certificates, timeouts, sampling and sizes of queue and batch
    come from the variables of OpenTelemetry."""

    def __init__(self, endpoint: str, version: str) -> None:
        self._exporter = _ReportingExporter(OTLPSpanExporter(endpoint=endpoint), endpoint)
        super().__init__(BatchSpanProcessor(self._exporter), version)

    @property
    def _patience(self) -> float:
        return _CLOSE_FAILING_S if self._exporter.is_failing else _CLOSE_S


class _ReportingExporter(SpanExporter):
    """Says once that a collector stops taking spans, and once that it takes them again, where the SDK says
    it for each batch."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._last_words = _LastWords()
        for name in _SDK_LOGS:
            logger = logging.getLogger(name)
            logger.propagate = False
            logger.handlers = [self._last_words]
        self.is_failing = False
        self._num_lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._last_words.text = ""
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # whatever a collector answers
            self._last_words.text = f"{type(error).__name__}: {error}"
            result = SpanExportResult.FAILURE
        if result is not SpanExportResult.SUCCESS:
            self._num_lost += len(spans)
            if not self.is_failing:
                self.is_failing = True
                _log.warning("traces do not reach %s: %s", self._endpoint, self._last_words.text)
        elif self.is_failing:
            self.is_failing = False
            _log.info("traces reach %s again; %d spans or more were lost", self._endpoint, self._num_lost)
            self._num_lost = 0
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _LastWords(logging.Handler):
    """Keeps the first thing that the SDK has said about a batch: the cause; the rest is consequence."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or record.getMessage()


class TraceRequests:
    """An ASGI layer that gives each request which generates something a span. It belongs behind the guard,
    so that who has no key makes no spans."""

    def __init__(self, app: ASGIApp, *, traces: Traces) -> None:
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = None
        if scope["type"] == "http" and scope["method"] == "POST":
            operation = _OPERATIONS.get(scope["path"])
        if operation is None:
            await self._app(scope, receive, send)
            return
        trace = _SpanTrace(self._traces, operation, scope)
        request_trace.set(trace)
        trace_fields.set(trace.ids)

        async def noting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except ClientDisconnect:
            trace.error = CLIENT_DISCONNECTED
            raise
        except asyncio.CancelledError:
            trace.error = "shutting_down"
            raise
        except Exception as error:
            trace.error = type(error).__name__
            raise
        finally:
            trace.end()


class _SpanTrace:
    """The span of one request, and what it is told until it ends.

    It ends with the response. What runs in the background goes on, and only its children follow.
    """

    def __init__(self, traces: Traces, operation: str, scope: Scope) -> None:
        self._tracer = traces.tracer
        self._operation = operation
        self._call: Call | None = None
        self._ended: list[SequenceTimes] = []
        # Spans want the time of day, and what they are made of is monotonic.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        parents = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        self._span = self._tracer.start_span(
            operation,
            context=TraceContextTextMapPropagator().extract(parents),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "inflightd",
                "http.request.method": "POST",
                "http.route": scope["path"],
                "http.response.header.x-request-id": [scope["state"]["request_id"]],
            },
        )
        context = self._span.get_span_context()
        self.ids = {"trace_id": format_trace_id(context.trace_id), "span_id": format_span_id(context.span_id)}
        self.status: int | None = None
        self.error: str | None = None

    def describe(self, call: Call) -> None:
        self._call = call

    def add(self, times: SequenceTimes) -> None:
        self._ended.append(times)
        if self._is_sampled and times.scheduled and len(self._ended) <= _MAX_CHILDREN:
            self._add_children(times)

    @property
    def _is_sampled(self) -> bool:
        return self._span.get_span_context().trace_flags.sampled

    def _add_children(self, times: SequenceTimes) -> None:
        arrival = times.request.arrival_time
        scheduled = max(times.scheduled, arrival)
        first = max(times.first_token or times.ended, scheduled)
        prompt = {
            "gen_ai.usage.input_tokens": len(times.request.prompt_token_ids),
            "gen_ai.usage.cache_read.input_tokens": times.num_cached_tokens,
        }
        answer = {
            "gen_ai.usage.output_tokens": times.num_tokens,
            "gen_ai.response.finish_reasons": [times.reason.value],
        }
        self._child("queue", arrival, scheduled, times, {})
        self._child("prefill", scheduled, first, times, prompt)
        if times.first_token:
            self._child("decode", first, max(times.last_token, first), times, answer)

    def _child(
        self, name: str, began: float, ended: float, times: SequenceTimes, attributes: dict[str, Any]
    ) -> None:
        span = self._tracer.start_span(
            name,
            context=set_span_in_context(self._span),
            attributes={"gen_ai.request.id": times.request.request_id, **attributes},
            start_time=self._nanoseconds(began),
        )
        span.end(self._nanoseconds(ended))

    def _nanoseconds(self, monotonic: float) -> int:
        return int(monotonic * 1e9) + self._epoch_ns

    def end(self) -> None:
        """The response is over."""
        span = self._span
        if span.is_recording():
            if self._call is not None:
                span.update_name(f"{self._operation} {self._call.model}")
                span.set_attributes(_asked(self._call))
            if self._ended:
                span.set_attributes(_became(self._ended))
            if self.status is not None:
                span.set_attribute("http.response.status_code", self.status)
            self._tell_error()
        span.end()

    def _tell_error(self) -> None:
        error, is_ours = self.error, self.error != CLIENT_DISCONNECTED
        if error is None and self.status is not None and self.status >= 400:
            error, is_ours = str(self.status), self.status >= 500
        elif error is None and any(times.reason is FinishReason.ERROR for times in self._ended):
            error = "error"  # after the response had begun
        if error is not None:
            self._span.set_attribute("error.type", error)
            if is_ours:
                self._span.set_status(Status(StatusCode.ERROR))


def _asked(call: Call) -> dict[str, Any]:
    params = call.requests[0].params
    attributes: dict[str, Any] = {
        "gen_ai.request.model": call.model,
        "gen_ai.response.model": call.model,
        "gen_ai.response.id": call.id,
        "gen_ai.request.id": call.requests[0].request_id,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.n": call.n,
    }
    if params.top_k:
        attributes["gen_ai.request.top_k"] = params.top_k
    if call.n > 1:
        attributes["gen_ai.request.choice.count"] = call.n
    return attributes


def _became(ended: Sequence[SequenceTimes]) -> dict[str, Any]:
    """Tokens and times of all sequences of a call. Times are seconds, as a client sees them: to the first of
    several first tokens, to the last of the last ones."""
    prompts = {times.request.prompt_token_ids: times for times in ended}.values()
    num_input = sum(len(times.request.prompt_token_ids) for times in prompts)
    num_output = sum(times.num_tokens for times in ended)
    arrival = ended[0].request.arrival_time
    attributes: dict[str, Any] = {
        "gen_ai.usage.input_tokens": num_input,
        "gen_ai.usage.output_tokens": num_output,
        "gen_ai.usage.prompt_tokens": num_input,  # vLLM's names of both
        "gen_ai.usage.completion_tokens": num_output,
        "gen_ai.usage.cache_read.input_tokens": sum(times.num_cached_tokens for times in prompts),
        "gen_ai.usage.num_sequences": len(ended),
        "gen_ai.response.finish_reasons": [times.reason.value for times in ended],
        "gen_ai.latency.e2e": max(times.ended for times in ended) - arrival,
    }
    answered = [times for times in ended if times.first_token]
    if answered:
        scheduled = max(min(times.scheduled for times in answered), arrival)
        first = min(times.first_token for times in answered)
        last = max(times.last_token for times in answered)
        attributes |= {
            "gen_ai.latency.time_in_queue": scheduled - arrival,
            "gen_ai.latency.time_to_first_token": first - arrival,
            "gen_ai.latency.time_in_model_prefill": max(first - scheduled, 0.0),
            "gen_ai.latency.time_in_model_decode": last - first,
            "gen_ai.latency.time_in_model_inference": max(last - scheduled, 0.0),
        }
    return attributes
