"""Spans of requests: what is in them, what never is, and a collector that does not work."""

from __future__ import annotations

import asyncio
import http.server
import io
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from scheduler.hashing_executor import HashingExecutor
from scheduler.messages import EngineOutput, FinishReason, Request
from server import cli, otlp_settings
from server.api_keys import api_key
from server.config import ServerConfig
from server.engine_protocol import EngineClient
from server.errors import EngineDeadError
from server.logs import JsonFormatter, TextFormatter, trace_fields
from server.otlp_settings import TracesError, parse_endpoint, traces_endpoint
from server.tokenizer import Tokenizer
from server.tracing import OtlpTraces, Traces
from tests.server.http_client import MODEL, api, chat
from tests.server.in_process_engine import HashingEngine, ScriptedEngine, tokens

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}


@asynccontextmanager
async def traced(
    engine: EngineClient, tokenizer: Tokenizer, traces: Traces, config: ServerConfig | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    try:
        async with api(engine, tokenizer, config, traces) as client:
            yield client
    finally:
        await traces.close()


class InMemory(Traces):
    """Keeps its spans."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        super().__init__(SimpleSpanProcessor(self._exporter), "1.2.3")

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    @property
    def servers(self) -> list[ReadableSpan]:
        return [span for span in self.spans if span.kind.name == "SERVER"]


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_a_span_with_queue_prefill_and_decode(tokenizer: Tokenizer, stream: bool) -> None:
    def script(request: Request) -> Iterator[EngineOutput]:
        scheduled = request.arrival_time + 0.01
        time.sleep(0.03)
        yield EngineOutput(request.request_id, (28,), num_cached_tokens=3, first_scheduled_time=scheduled)
        time.sleep(0.02)
        yield EngineOutput(request.request_id, (28, 28), finish_reason=FinishReason.LENGTH)

    traces = InMemory()
    began = time.time_ns()
    async with traced(ScriptedEngine(script), tokenizer, traces) as client:
        body = chat(stream=stream, max_tokens=3, temperature=0.5, top_k=7)
        answer = await client.post(
            "/v1/chat/completions", json=body, headers=TRACED | {"x-request-id": "mine"}
        )
    assert answer.status_code == 200
    *children, span = traces.spans
    assert span.name == f"chat {MODEL}"
    assert span.kind.name == "SERVER"
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    assert span.resource.attributes["service.name"] == "inflightd"
    attributes = dict(span.attributes or {})
    num_prompt = attributes["gen_ai.usage.input_tokens"]
    assert isinstance(num_prompt, int)
    assert num_prompt > 5
    for name, value in {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "inflightd",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 7,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.usage.prompt_tokens": num_prompt,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "http.response.header.x-request-id": ("mine",),
    }.items():
        assert attributes[name] == value, name
    assert "error.type" not in attributes
    latency = {
        name.rpartition(".")[2]: value
        for name, value in attributes.items()
        if isinstance(value, float) and ".latency." in name
    }
    assert latency["time_in_queue"] == pytest.approx(0.01)
    assert latency["time_in_queue"] + latency["time_in_model_prefill"] == pytest.approx(
        latency["time_to_first_token"]
    )
    assert latency["time_in_model_decode"] >= 0.02
    assert latency["time_to_first_token"] >= 0.03
    assert latency["e2e"] <= seconds(span) + 0.001
    assert [child.name for child in children] == ["queue", "prefill", "decode"]
    assert [seconds(child) for child in children] == pytest.approx(
        [latency[f"time_in_{part}"] for part in ("queue", "model_prefill", "model_decode")], abs=1e-5
    )
    for child in children:
        assert child.parent is not None
        assert child.parent.span_id == span.context.span_id
        assert child.context.trace_id == span.context.trace_id
    assert children[0].start_time is not None
    assert began < children[0].start_time < time.time_ns()


async def test_every_operation_and_several_choices(tokenizer: Tokenizer) -> None:
    traces = InMemory()
    engine = HashingEngine(HashingExecutor(64, 4, vocab_size=tokenizer.vocab_size, max_model_len=200))
    async with traced(engine, tokenizer, traces) as client:
        for path, body in (
            ("/v1/chat/completions", chat(n=3, max_tokens=2, ignore_eos=True)),
            ("/v1/completions", {"prompt": ["a b", "c"], "max_tokens": 2, "ignore_eos": True}),
            ("/v1/messages", chat(max_tokens=2)),
            ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
            ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 2}}),
            ("/v1/completions", {"prompt": "x", "n": 12, "max_tokens": 1}),
        ):
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, answer.text
        for path in ("/health", "/metrics", "/v1/models", "/nowhere"):
            await client.get(path)
        await client.post("/tokenize", json={"prompt": "x"})
    names = [(span.name, dict(span.attributes or {})["http.route"]) for span in traces.servers]
    assert names == [
        (f"{operation} {MODEL}", path)
        for operation, path in (
            ("chat", "/v1/chat/completions"),
            ("text_completion", "/v1/completions"),
            ("chat", "/v1/messages"),
            ("chat", "/v1/responses"),
            ("text_completion", "/generate"),
            ("text_completion", "/v1/completions"),
        )
    ]
    first, second = (dict(span.attributes or {}) for span in traces.servers[:2])
    assert (first["gen_ai.usage.output_tokens"], first["gen_ai.request.choice.count"]) == (6, 3)
    assert first["gen_ai.response.finish_reasons"] == ("length",) * 3
    assert second["gen_ai.usage.input_tokens"] == len(tokenizer.encode("a b")) + len(tokenizer.encode("c"))
    # Spans of choices are bounded: 3 + 2 + 1 + 1 + 1 + 8 of the last 12.
    assert len(traces.spans) == 6 + 3 * 16


@pytest.mark.parametrize(
    ("engine", "body", "error", "is_ours"),
    [
        (ScriptedEngine(tokens([28])), chat(temperature=9), "400", False),
        (ScriptedEngine(lambda request: [RuntimeError("gone")]), chat(), "RuntimeError", True),
        (ScriptedEngine(lambda request: [EngineDeadError("gone")]), chat(), "503", True),
        (ScriptedEngine(tokens([28], [], finish=FinishReason.ERROR)), chat(stream=True), "error", True),
    ],
)
async def test_errors(
    tokenizer: Tokenizer, engine: EngineClient, body: dict[str, Any], error: str, is_ours: bool
) -> None:
    traces = InMemory()
    async with traced(engine, tokenizer, traces) as client:
        await client.post("/v1/chat/completions", json=body)
    (span,) = traces.servers
    assert dict(span.attributes or {})["error.type"] == error
    assert span.status.is_ok is not is_ours


async def test_who_has_no_key_makes_no_spans(tokenizer: Tokenizer) -> None:
    traces = InMemory()
    config = ServerConfig(api_key=(api_key("sk-1"),))
    async with traced(ScriptedEngine(tokens([28])), tokenizer, traces, config) as client:
        assert (await client.post("/v1/chat/completions", json=chat())).status_code == 401
    assert not traces.spans


@pytest.mark.parametrize(
    ("header", "is_followed", "is_sampled"),
    [
        (TRACED["traceparent"], True, True),
        (TRACED["traceparent"][:-1] + "0", True, False),  # whoever began the trace does not record it
        ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", False, True),
        ("ff-" + TRACED["traceparent"][3:], False, True),
        ("x" * 5000, False, True),
        ("\u00e9", False, True),
    ],
)
async def test_contexts(tokenizer: Tokenizer, header: str, is_followed: bool, is_sampled: bool) -> None:
    traces = InMemory()
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("server.request")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        async with traced(ScriptedEngine(tokens([28], [28])), tokenizer, traces) as client:
            headers = {"traceparent": header.encode("latin-1")}
            answer = await client.post("/v1/chat/completions", json=chat(stream=True), headers=headers)
            assert answer.status_code == 200
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert bool(traces.spans) is is_sampled
    line = json.loads(log.getvalue())
    assert (line["trace_id"] == TRACE_ID) is is_followed
    if is_sampled:
        context = traces.servers[0].context
        assert (line["trace_id"], line["span_id"]) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")


def test_lines_of_a_trace_carry_its_ids_in_both_forms() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "said", (), None)
    before = trace_fields.set({"trace_id": TRACE_ID, "span_id": PARENT_ID})
    try:
        assert TextFormatter().format(record).endswith(f"x: said trace_id={TRACE_ID} span_id={PARENT_ID}")
        line = json.loads(JsonFormatter().format(record))
        assert (line["trace_id"], line["span_id"]) == (TRACE_ID, PARENT_ID)
    finally:
        trace_fields.reset(before)


def test_lines_without_a_trace_carry_no_ids() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "said", (), None)
    trace_fields.set({})
    assert "trace_id" not in JsonFormatter().format(record) + TextFormatter().format(record)


class Collector:
    """An OTLP receiver: decodes what is posted to it."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200
        received = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces"
                if received.status == 200:
                    received.requests.append(ExportTraceServiceRequest.FromString(body))
                    received.headers.append(dict(self.headers))
                self.send_response(received.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __len__(self) -> int:
        return sum(
            len(scope.spans) for r in self.requests for res in r.resource_spans for scope in res.scope_spans
        )


async def test_a_collector_gets_spans_in_batches_and_no_prompt(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer secret-of-the-collector")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    with closing(Collector()) as collector:
        async with traced(
            ScriptedEngine(tokens([28], [28])), tokenizer, OtlpTraces(collector.url, "1")
        ) as client:
            for stream in (False, True):
                body = chat("the xyzzy prompt", stream=stream, user="plugh", stop=["grault"])
                for _ in range(3):
                    await client.post("/v1/chat/completions", json=body, headers=TRACED)
        assert len(collector) == 6 * 4
        assert len(collector.requests) < 6
        assert collector.headers[0]["authorization"] == "Bearer secret-of-the-collector"
        (resource,) = {
            attribute.value.string_value
            for request in collector.requests
            for spans in request.resource_spans
            for attribute in spans.resource.attributes
            if attribute.key == "service.name"
        }
        assert resource == "ours"
        sent = b"".join(request.SerializeToString() for request in collector.requests)
        assert b"gen_ai.usage.output_tokens" in sent
        for word in (b"xyzzy", b"plugh", b"grault"):
            assert word not in sent


async def test_a_collector_that_is_gone_or_silent_costs_spans_and_nothing_else(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16")

    async def run(traces: Traces) -> float:
        began = time.perf_counter()
        async with traced(ScriptedEngine(tokens([28], [28])), tokenizer, traces) as client:
            for _ in range(60):
                answer = await client.post("/v1/completions", json={"prompt": "x"})
                assert answer.status_code == 200
            took = time.perf_counter() - began
            began = time.perf_counter()
        closed = time.perf_counter() - began
        assert closed < 4
        return took

    quiet = await run(InMemory())
    refusing = "http://127.0.0.1:9/v1/traces"
    monkeypatch.setattr("server.tracing._CLOSE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        for url in (refusing, f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"):
            with caplog.at_level(logging.INFO):
                assert await run(OtlpTraces(url, "1")) < 5 * quiet + 0.5
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) <= 2
    for name in ("opentelemetry", "urllib3", "requests"):
        assert not any(record.name.startswith(name) for record in caplog.records)


async def test_a_collector_that_comes_back(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with closing(Collector()) as collector, caplog.at_level(logging.INFO):
        collector.status = 401
        async with traced(ScriptedEngine(tokens([28])), tokenizer, OtlpTraces(collector.url, "1")) as client:
            for _ in range(5):
                await client.post("/v1/completions", json={"prompt": "x"})
                await asyncio.sleep(0.05)
            collector.status = 200
            await client.post("/v1/completions", json={"prompt": "x"})
        # The test before may have left a thread with something to say.
        said = [message for message in caplog.messages if f" {collector.url}" in message]
        assert len(said) == 2
        assert said[0].startswith(f"traces do not reach {collector.url}: ")
        assert "401" in said[0]
        assert "again" in said[1]
        assert len(collector)


@pytest.mark.parametrize(
    ("flag", "environment", "expected"),
    [
        (None, {}, None),
        (
            "http://c:4318/v1/traces",
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x/y"},
            "http://c:4318/v1/traces",
        ),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x/y"}, "http://x/y"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://x:1/base/"}, "https://x:1/base/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "nonsense"}, None),
        ("http://c/p", {"OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_where_spans_go(flag: str | None, environment: dict[str, str], expected: str | None) -> None:
    assert traces_endpoint(flag, environment) == expected


def test_endpoints() -> None:
    assert parse_endpoint("http://c:4318") == parse_endpoint("http://c:4318/") == "http://c:4318/v1/traces"
    assert parse_endpoint("https://c/otlp/v1/traces") == "https://c/otlp/v1/traces"
    for bad in ("c:4318", "grpc://c:4317", "http://", "http://c:x", ""):
        with pytest.raises(ValueError, match="is not a URL"):
            parse_endpoint(bad)


def test_what_stands_in_the_way_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(TracesError, match="4318"):
        traces_endpoint("http://c/p", {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"})
    monkeypatch.setattr(otlp_settings, "_EXPORTER", "opentelemetry.missing.http")
    assert traces_endpoint(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}) is None
    assert cli.main(["serve", str(tmp_path), "--otlp-traces-endpoint", "http://c:4318"]) == 1
    assert (
        "--otlp-traces-endpoint: the packages of the extra 'otel' are not installed"
        in capsys.readouterr().err
    )
