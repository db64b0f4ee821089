from __future__ import annotations

import asyncio
import os
import re
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scheduler.hashing_executor import HashingExecutor
from scheduler.messages import EngineOutput, EngineStats, FinishReason, Request, SamplingParams
from server import operation_metrics
from server.admission import Admission
from server.app import create_app
from server.config import ServerConfig
from server.metrics import Metrics, RequestTimer
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, chat
from tests.server.in_process_engine import HashingEngine, ScriptedEngine, tokens

_TOKEN_LATENCY = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
]  # fmt: skip
_REQUEST_LATENCY = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
]  # fmt: skip
_TOKENS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0]  # up to the context of 512

# The names, types and buckets that dashboards made for vLLM rely on.
CONTRACT: dict[str, tuple[str, list[float] | None]] = {
    "num_requests_running": ("gauge", None),
    "num_requests_waiting": ("gauge", None),
    "kv_cache_usage_perc": ("gauge", None),
    "prefix_cache_queries": ("counter", None),
    "prefix_cache_hits": ("counter", None),
    "num_preemptions": ("counter", None),
    "prompt_tokens": ("counter", None),
    "generation_tokens": ("counter", None),
    "request_success": ("counter", None),
    "time_to_first_token_seconds": (
        "histogram",
        [
            0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
            40.0, 80.0, 160.0, 640.0, 2560.0,
        ],
    ),
    "inter_token_latency_seconds": ("histogram", _TOKEN_LATENCY),
    "request_time_per_output_token_seconds": ("histogram", _TOKEN_LATENCY),
    "e2e_request_latency_seconds": ("histogram", _REQUEST_LATENCY),
    "request_queue_time_seconds": ("histogram", _REQUEST_LATENCY),
    "request_inference_time_seconds": ("histogram", _REQUEST_LATENCY),
    "request_prefill_time_seconds": ("histogram", _REQUEST_LATENCY),
    "request_decode_time_seconds": ("histogram", _REQUEST_LATENCY),
    "iteration_tokens_total": (
        "histogram",
        [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0],
    ),
    "request_params_n": ("histogram", [1.0, 2.0, 5.0, 10.0, 20.0]),
    "request_prompt_tokens": ("histogram", _TOKENS),
    "request_generation_tokens": ("histogram", _TOKENS),
    "request_params_max_tokens": ("histogram", _TOKENS),
    "cache_config_info": ("gauge", None),
}  # fmt: skip


def _samples(page: str, prefix: str = "inflightd") -> dict[str, float]:
    """Values by name and by those labels that tell the samples of a metric apart."""
    values = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            name = sample.name.removeprefix(prefix + ":")
            values[name + "".join(f" {k}={v}" for k, v in sorted(labels.items()))] = sample.value
    return values


@pytest.mark.parametrize("prefix", ["inflightd", "vllm"])
async def test_the_contract(tokenizer: Tokenizer, prefix: str) -> None:
    config = ServerConfig(metrics_prefix=prefix)
    async with api(ScriptedEngine(tokens([28])), tokenizer, config) as client:
        await client.post("/v1/chat/completions", json=chat())
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    for name, (kind, buckets) in CONTRACT.items():
        family = families[f"{prefix}:{name}"]
        assert family.type == kind, name
        for sample in family.samples:
            assert sample.labels["engine"] == "0"
            assert name == "cache_config_info" or sample.labels["model_name"] == MODEL
        if buckets is not None:
            bounds = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")]
            assert bounds == [*buckets, float("inf")]
    assert {s.labels["finished_reason"] for s in families[f"{prefix}:request_success"].samples} == {
        "stop",
        "length",
        "abort",
        "error",
    }
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6


async def test_the_engine_shows_through(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([28]))
    engine.stats = EngineStats(3, 4, 0.25, 100, 60, 5, 9)
    engine.step_tokens.observe(20)
    engine.step_tokens.observe(1)
    async with api(engine, tokenizer) as client:
        values = _samples((await client.get("/metrics")).text)
    assert values["num_requests_running"] == 3
    assert values["num_requests_waiting"] == 4
    assert values["kv_cache_usage_perc"] == 0.25
    assert values["prefix_cache_queries_total"] == 100
    assert values["prefix_cache_hits_total"] == 60
    assert values["num_preemptions_total"] == 5
    assert values["iteration_tokens_total_count"] == 2
    assert values["iteration_tokens_total_sum"] == 21
    assert values["iteration_tokens_total_bucket le=16.0"] == 1


async def test_counts_of_real_requests(tokenizer: Tokenizer) -> None:
    engine = HashingEngine(HashingExecutor(64, 4, vocab_size=tokenizer.vocab_size, max_model_len=200))
    async with api(engine, tokenizer) as client:
        bodies = [{"prompt": "One two", "max_tokens": k, "ignore_eos": True} for k in (1, 5, 9)]
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        values = _samples((await client.get("/metrics")).text)
    usages = [answer.json()["usage"] for answer in answers]
    assert values["generation_tokens_total"] == sum(u["completion_tokens"] for u in usages) == 15
    assert values["prompt_tokens_total"] == sum(u["prompt_tokens"] for u in usages)
    assert values["request_success_total finished_reason=length"] == 3
    assert values["time_to_first_token_seconds_count"] == 3
    assert values["inter_token_latency_seconds_count"] == 15 - 3
    assert values["e2e_request_latency_seconds_count"] == 3
    assert values["request_queue_time_seconds_count"] == 3
    assert values["request_generation_tokens_sum"] == 15
    assert values["request_generation_tokens_bucket le=5.0"] == 2
    assert values["request_params_max_tokens_sum"] == 15
    parts = [values[f"request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(values["e2e_request_latency_seconds_sum"], rel=0.2, abs=0.02)


async def test_ends_by_reason(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([28], [28]))
    async with api(engine, tokenizer) as client:
        await client.post("/v1/completions", json={"prompt": "x", "stop": ","})
        engine.script = tokens([28], finish=FinishReason.STOP)
        await client.post("/v1/completions", json={"prompt": "x"})
        engine.script = tokens([28], [], finish=FinishReason.ERROR)
        await client.post("/v1/completions", json={"prompt": "x"})
        engine.script = lambda request: [RuntimeError("gone")]
        await client.post("/v1/completions", json={"prompt": "x"})
        values = _samples((await client.get("/metrics")).text)
    counts = {reason: values[f"request_success_total finished_reason={reason}"] for reason in FinishReason}
    assert counts == {"stop": 2, "length": 0, "error": 2, "abort": 0}
    assert values["e2e_request_latency_seconds_count"] == 4


def test_times_of_a_request() -> None:
    engine = ScriptedEngine(tokens([1]))
    metrics = Metrics("x", "m", engine, Admission(ServerConfig(), engine))
    request = Request("r", (1, 2, 3), SamplingParams(max_tokens=8), arrival_time=100.0)
    timer = RequestTimer(metrics, request)
    timer.observe(EngineOutput("r", (1,), first_scheduled_time=100.5), 102.0)
    timer.observe(EngineOutput("r", (1, 1)), 102.2)  # two steps that arrived together
    timer.observe(EngineOutput("r"), 102.5)
    timer.observe(EngineOutput("r", (1,)), 103.0)
    for _ in range(2):
        timer.finish(FinishReason.LENGTH, 103.5)
    sums = {
        name: (getattr(metrics, name).cumulative()[1], getattr(metrics, name).cumulative()[0][-1][1])
        for name in (
            "time_to_first_token", "inter_token_latency", "time_per_output_token", "e2e_latency",
            "queue_time", "prefill_time", "decode_time", "inference_time",
        )
    }  # fmt: skip
    assert sums == {
        "time_to_first_token": (2.0, 1),
        "inter_token_latency": (pytest.approx(1.0), 3),
        "time_per_output_token": (pytest.approx(1.0 / 3), 1),
        "e2e_latency": (3.5, 1),
        "queue_time": (0.5, 1),
        "prefill_time": (1.5, 1),
        "decode_time": (1.0, 1),
        "inference_time": (2.5, 1),
    }


# 100,000 by hand: INFLIGHTD_SERIES_ROUNDS=25000.
_ROUNDS = int(os.environ.get("INFLIGHTD_SERIES_ROUNDS", "300"))


async def test_clients_cannot_make_series(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([28])), tokenizer) as client:
        await client.post("/v1/chat/completions", json=chat())

        async def series() -> set[str]:
            page = (await client.get("/metrics")).text
            return {re.sub(r" \S+$", "", line) for line in page.splitlines() if not line.startswith("#")}

        before = await series()
        for index in range(_ROUNDS):
            await client.get(f"/random/{index}")
            await client.request(f"VERB{index}", "/v1/models")
            await client.post("/v1/chat/completions", json=chat(model=f"model-{index}"))
            if index % 8 == 0:
                body = chat(user=f"user-{index}", seed=index, metadata={f"m{index}": "x"})
                headers = {"x-request-id": f"id-{index}", "user-agent": f"agent-{index}"}
                await client.post("/v1/chat/completions", json=body, headers=headers)
        assert await series() == before
        # Names that nobody knows are told apart as long as they are few and plain.
        for index in range(60):
            await client.post("/v1/completions", json={"prompt": "x", f"field_{index}": 1})
        added = await series() - before
        assert len(added) == 33
        began = time.perf_counter()
        assert (await client.get("/metrics")).status_code == 200
        assert time.perf_counter() - began < 0.1


async def test_the_server_itself(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation_metrics, "_LAG_EVERY_S", 0.1)
    engine = ScriptedEngine(tokens([28]))
    engine.stats = EngineStats(
        num_waiting=2,
        recomputed_tokens_total=70,
        steps_total=5,
        schedule_seconds_total=0.5,
        execute_seconds_total=4.0,
        update_seconds_total=0.25,
    )
    engine.num_restarts = 3
    app = create_app(ServerConfig(), engine, tokenizer)
    operation = app.state.service.metrics.operation
    watching = asyncio.create_task(operation.watch_loop())
    await asyncio.sleep(0.01)
    time.sleep(0.5)  # noqa: ASYNC251 - it is the event loop that this is about
    await asyncio.sleep(0.01)
    watching.cancel()
    values = _samples(app.state.service.metrics.text().decode())
    assert values["num_requests_waiting_by_reason reason=capacity"] == 2
    assert values["num_requests_waiting_by_reason reason=admission"] == 0
    assert {name: value for name, value in values.items() if "rejections_total" in name} == {
        f"request_rejections_total reason={reason}": 0 for reason in ("requests", "tokens", "key", "timeout")
    }
    assert values["engine_restarts_total"] == 3
    assert values["recomputed_tokens_total"] == 70
    assert values["engine_step_seconds_total phase=execute"] == 4.0
    assert values["event_loop_lag_seconds_count"] == 1
    assert 0.3 < values["event_loop_lag_seconds_sum"] < 1.0


@pytest.mark.parametrize("compat", [None, "tgi"])
async def test_names_of_others(tokenizer: Tokenizer, compat: str | None) -> None:
    config = ServerConfig(metrics_compat=compat)
    async with api(ScriptedEngine(tokens([28], [28])), tokenizer, config) as client:
        await client.post("/v1/chat/completions", json=chat())
        page = (await client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    for name in ("request_duration", "time_to_first_token", "time_per_output_token"):
        family = families[f"gen_ai_server_{name}_seconds"]
        counts = [sample for sample in family.samples if sample.name.endswith("_count")]
        assert [sample.value for sample in counts] == [1]
        assert counts[0].labels["gen_ai_request_model"] == MODEL
    tgi = {name: family for name, family in families.items() if name.startswith("tgi_")}
    if compat is None:
        assert not tgi
        return
    values = _samples(page)
    assert (values["tgi_request_count_total"], values["tgi_request_success_total"]) == (1, 1)
    assert values["tgi_request_generated_tokens_sum"] == 2
    assert values["tgi_request_duration_count"] == 1
    assert {"tgi_queue_size", "tgi_batch_current_size", "tgi_request_queue_duration"} <= set(tgi)
