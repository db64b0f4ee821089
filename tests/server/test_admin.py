"""The operator's interface: who gets in, what actions do, what is logged, and that streams do not mind."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from scheduler.engine_core import EngineCore
from scheduler.hashing_executor import HashingExecutor, run_alone
from scheduler.messages import EngineOutput, ProfileSteps, Request, SamplingParams, StepPhase
from server.admin.admin_app import create_admin_app
from server.admin.chrome_trace import chrome_trace
from server.admin.operated_server import LoneServer
from server.admin.operated_workers import OperatedWorkers, answer_operator
from server.api_keys import ApiKeys, api_key
from server.app import create_app
from server.config import ServerConfig
from server.errors import ProfileRunningError
from server.logs import JsonFormatter, log_level, set_log_level
from server.tokenizer import Tokenizer
from tests.server.http_client import chat, events
from tests.server.in_process_engine import HashingEngine

KEY = "op-1"
WITH_KEY = {"authorization": f"Bearer {KEY}"}


class OperatedEngine(HashingEngine):
    """The hashing engine with what an operator asks of one."""

    def __init__(self, executor: HashingExecutor) -> None:
        super().__init__(executor)
        self.levels: list[str] = []
        self.profiles: list[tuple[int, float]] = []

    async def flush_prefix_cache(self) -> int:
        return self.core.flush_prefix_cache()

    async def profile(self, num_steps: int, seconds: float) -> tuple[StepPhase, ...]:
        self.profiles.append((num_steps, seconds))
        if len(self.profiles) > 1:
            raise ProfileRunningError
        return (StepPhase(1, "schedule", 1.0, 0.5, 3, 2),)

    def set_log_level(self, level: str) -> None:
        self.levels.append(level)


class Both:
    """A server's two applications and their clients."""

    def __init__(self, engine: OperatedEngine, tokenizer: Tokenizer, config: ServerConfig) -> None:
        self.engine = engine
        self.app = create_app(config, engine, tokenizer)
        self.admin_app = create_admin_app(LoneServer(self.app.state.service, engine), config.admin_keys)
        self.main = self._client(self.app, {})
        self.admin = self._client(self.admin_app, WITH_KEY)
        self.stranger = self._client(self.admin_app, {})

    def _client(self, app: FastAPI, headers: dict[str, str]) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    async def answer(self, prompt: str, max_tokens: int = 60) -> str:
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "seed": 3, "stream": True}
        answer = await self.main.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        *pieces, done = events(answer.text)
        assert done == "[DONE]"
        return "".join(piece["choices"][0]["text"] for piece in pieces)


@pytest.fixture
async def both(tokenizer: Tokenizer) -> AsyncIterator[Both]:
    executor = HashingExecutor(256, 4, vocab_size=tokenizer.vocab_size, max_model_len=400, max_num_seqs=8)
    both = Both(OperatedEngine(executor), tokenizer, ServerConfig(admin_key=(api_key(KEY, "ops"),)))
    yield both
    await both.app.state.service.close()


def routes_of(app: FastAPI) -> Iterator[tuple[str, str]]:
    for route in iter_route_contexts(app.routes):
        for method in sorted(route.methods or ()):
            yield method, re.sub(r"\{[^}]*\}", "x", str(route.path))


BODIES: dict[str, dict[str, Any]] = {"/admin/log_level": {"level": "info"}}


async def test_every_route_wants_an_operators_key(both: Both, tokenizer: Tokenizer) -> None:
    routes = list(routes_of(both.admin_app))
    assert len(routes) == 9
    bad = ["", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Basic {KEY}", f"Bearer {'x' * 10_000}"]
    for method, path in [*routes, ("GET", "/nowhere"), ("GET", "/health/live")]:
        for header in bad:
            refused = await both.stranger.request(method, path, headers={"authorization": header}, json={})
            assert refused.status_code == 401, (method, path)
            assert refused.json()["error"]["code"] == "invalid_api_key"
        taken = await both.admin.request(method, path, json=BODIES.get(path, {}))
        assert taken.status_code != 401, (method, path)
    config = ServerConfig(api_key=(api_key("client"),), admin_key=(api_key(KEY),))
    separate = Both(OperatedEngine(HashingExecutor(64, 4)), tokenizer, config)
    assert (await separate.stranger.get("/admin/status", headers={"x-api-key": "client"})).status_code == 401
    assert (await separate.main.get("/v1/models", headers=WITH_KEY)).status_code == 401
    await separate.app.state.service.close()


async def test_the_main_port_has_none_of_it(both: Both) -> None:
    assert not [path for _, path in routes_of(both.app) if "admin" in path]
    for method, path in routes_of(both.admin_app):
        answer = await both.main.request(method, path, json=BODIES.get(path, {}), headers=WITH_KEY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert both.app.state.service.takes_requests


async def test_what_is_wrong_gets_an_error_in_the_usual_form(both: Both) -> None:
    client = both.admin
    for method, path in routes_of(both.admin_app):
        wrong = "DELETE"
        answer = await client.request(wrong, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
        if method == "GET":
            continue
        for content, headers, status, code in (
            (b"{", {"content-type": "application/json"}, 400, "invalid_json"),
            (b"[]", {"content-type": "application/json"}, 400, "invalid_json"),
            (b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),  # a web page's form
            (b"{}", {}, 400, None),
            (b'{"levl": 1}', {"content-type": "application/json"}, 400, "unknown_parameter"),
            (b"x" * 70_000, {"content-type": "application/json"}, 413, "request_too_large"),
        ):
            answer = await client.request(method, path, content=content, headers=headers)
            error = answer.json()["error"]
            if code == "unknown_parameter" and path == "/admin/log_level":
                code = "missing_required_parameter"
            assert (answer.status_code, error["code"]) == (status, code), (path, content[:20])
    for body, param in (
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 10**9}, "num_steps"),
        ({"num_steps": "5"}, "num_steps"),
        ({"seconds": 61}, "seconds"),
        ({"seconds": 0}, "seconds"),
    ):
        answer = await client.post("/admin/profile", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    answer = await client.put("/admin/log_level", json={"level": "loud"})
    assert answer.json()["error"]["param"] == "level"
    assert both.app.state.service.takes_requests
    assert not both.engine.profiles
    assert not both.engine.levels


async def test_a_drained_server_finishes_what_runs_and_takes_nothing_new(both: Both) -> None:
    both.engine.pause = 0.005
    expected = await both.answer("first")
    running = asyncio.create_task(both.answer("first"))
    while not (await both.admin.get("/admin/requests")).json()["data"]:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    assert (await both.admin.post("/admin/drain", json={})).json()["takes_requests"] is False
    ready = await both.main.get("/health/ready")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
    assert (await both.main.get("/health/live")).status_code == 200
    for path, body in (
        ("/v1/chat/completions", chat()),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/messages", chat(max_tokens=2)),
        ("/v1/responses", {"input": "x"}),
        ("/generate", {"inputs": "x"}),
        ("/v1/embeddings", {"input": "x"}),
    ):
        refused = await both.main.post(path, json=body)
        assert refused.status_code == 503, path
        assert int(refused.headers["retry-after"]) >= 1
    status = (await both.admin.get("/admin/status")).json()
    assert (status["calls"], status["is_ready"], status["is_engine_ready"]) == (1, False, True)
    assert await running == expected
    assert (await both.admin.get("/admin/status")).json()["calls"] == 0
    assert (await both.admin.post("/admin/undrain", json={})).json()["is_ready"] is True
    assert (await both.main.get("/health/ready")).status_code == 200
    assert await both.answer("first") == expected


async def test_running_requests_are_listed_without_what_they_say(both: Both) -> None:
    both.engine.pause = 0.01
    body = chat("the secret xyzzy", n=2, max_tokens=300, ignore_eos=True, user="plugh", stop=["grault"])
    running = asyncio.create_task(
        both.main.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine"})
    )
    shown: dict[str, Any] = {}
    while not shown.get("generated_tokens"):
        listed = await both.admin.get("/admin/requests")
        shown = next(iter(listed.json()["data"]), {})
        await asyncio.sleep(0.01)
    for word in ("xyzzy", "plugh", "grault"):
        assert word not in listed.text
    assert shown["x_request_id"] == "mine"
    assert (shown["choices"], shown["max_tokens"], shown["state"]) == (2, 600, "answering")
    assert 5 < shown["prompt_tokens"] < 100
    assert 0 < shown["age_seconds"] < 60
    # By any of its three ids; here the one of the answer's second sequence.
    answer = await both.admin.post(f"/admin/requests/{shown['id']}-1/abort", json={})
    assert answer.json() == {"aborted": [shown["id"]]}
    failed = await running
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "request_aborted")
    assert failed.headers["x-should-retry"] == "false"
    gone = await both.admin.post("/admin/requests/mine/abort", json={})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "request_not_found")
    while both.engine.core.has_work:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert both.engine.stats.kv_cache_usage == 0


async def test_a_request_that_waits_is_aborted_too_and_others_go_on(both: Both) -> None:
    both.engine.pause = 0.002
    expected = await both.answer("other", 40)
    places = 8 + 4
    fillers = [asyncio.create_task(both.answer("other", 40)) for _ in range(places)]
    await asyncio.sleep(0.02)
    waiting = asyncio.create_task(
        both.main.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "late"})
    )
    while True:
        data = (await both.admin.get("/admin/requests")).json()["data"]
        states = [one["state"] for one in data if one["x_request_id"] == "late"]
        if states:
            break
        await asyncio.sleep(0.002)
    assert states == ["waiting"]
    assert (await both.admin.post("/admin/requests/late/abort", json={})).status_code == 200
    assert (await waiting).json()["error"]["code"] == "request_aborted"
    assert await asyncio.gather(*fillers) == [expected] * places


async def test_a_flush_forgets_prefixes_and_changes_no_token(both: Both) -> None:
    prompts = [f"A prompt with number {index} of some length, to fill some blocks" for index in range(6)]
    alone = [await both.answer(prompt) for prompt in prompts]
    for prompt in prompts:  # all of it was cached
        await both.answer(prompt, 1)
    hits = both.engine.stats.prefix_cache_hits_total
    assert hits > 0
    both.engine.pause = 0.002
    running = asyncio.gather(*(both.answer(prompt) for prompt in prompts))
    flushed = 0
    while not running.done():
        answer = await both.admin.post("/admin/prefix_cache/flush", json={})
        flushed += answer.json()["flushed_blocks"]
        both.engine.core.check_invariants()
        await asyncio.sleep(0.01)
    assert await running == alone
    assert flushed > 6 * 3
    await both.admin.post("/admin/prefix_cache/flush", json={})
    hits = both.engine.stats.prefix_cache_hits_total
    await both.answer(prompts[0], 1)
    assert both.engine.stats.prefix_cache_hits_total == hits
    assert (await both.admin.post("/admin/prefix_cache/flush", json={})).json()["flushed_blocks"] > 0


async def test_the_log_level_is_changed_everywhere(both: Both) -> None:
    before = log_level()
    try:
        answer = await both.admin.put("/admin/log_level", json={"level": "error"})
        assert answer.json() == (await both.admin.get("/admin/log_level")).json() == {"level": "error"}
        assert logging.getLogger("server.anything").getEffectiveLevel() == logging.ERROR
        assert both.engine.levels == ["error"]
    finally:
        set_log_level(before)


async def test_every_action_is_logged_whatever_the_level(both: Both) -> None:
    lines: list[dict[str, Any]] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonFormatter().format(record)))

    before, handler = log_level(), Keeping()
    logging.getLogger().addHandler(handler)
    try:
        asked = []
        for method, path in routes_of(both.admin_app):
            await both.admin.request(method, path, json={"level": "error"} if "level" in path else {})
            asked.append((method, path))
        await both.stranger.post("/admin/drain", json={})
    finally:
        logging.getLogger().removeHandler(handler)
        set_log_level(before)
    told = [line for line in lines if line["logger"] == "server.admin.admin_log"]
    assert [(line["method"], line["path"]) for line in told] == [*asked, ("POST", "/admin/drain")]
    assert {line["key"] for line in told[:-1]} == {"ops"}
    assert (told[-1]["key"], told[-1]["status"]) == (None, 401)
    by_path = {line["path"]: line for line in told}
    assert by_path["/admin/prefix_cache/flush"]["flushed_blocks"] == 0
    changed = next(line for line in told if line["method"] == "PUT")
    assert (changed["new_level"], changed["status"]) == ("error", 200)
    assert all(line["x_request_id"] for line in told)
    assert KEY not in json.dumps(lines)


async def test_a_profile_is_a_chrome_trace_and_there_is_one_at_a_time(both: Both) -> None:
    answer = await both.admin.post("/admin/profile", json={"num_steps": 7, "seconds": 2})
    assert both.engine.profiles == [(7, 2.0)]
    (event,) = [event for event in answer.json()["traceEvents"] if event["ph"] == "X"]
    assert (event["name"], event["ts"], event["dur"]) == ("schedule", 0, 500_000)
    assert event["args"] == {"step": 1, "tokens": 3, "sequences": 2}
    second = await both.admin.post("/admin/profile", json={})
    assert (second.status_code, second.json()["error"]["code"]) == (409, "profile_running")


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_phases_of_real_steps_as_a_chrome_trace(max_in_flight: int) -> None:
    executor = HashingExecutor(64, 4, max_in_flight=max_in_flight, step_seconds=0.001)
    core = EngineCore(executor)
    requests = [Request(f"r{i}", (1, 0, 1, i % 2), SamplingParams(seed=i, max_tokens=30)) for i in range(3)]
    for request in requests:
        core.add_request(request)
    core.profile(ProfileSteps(5, 10))
    outputs: list[EngineOutput] = []
    profiles = []
    while core.has_work:
        step = core.step()
        outputs += step.outputs
        profiles += [step.profile] if step.profile else []
    for request in requests:  # profiled or not
        got = [o.token_ids for o in outputs if o.request_id == request.request_id]
        assert [*itertools.chain(*got)] == run_alone(request, executor.spec)[0]
    (profile,) = profiles
    assert profile.profile_id == 5
    assert [phase.step_id for phase in profile.phases if phase.phase == "update"] == list(range(1, 11))
    events = [event for event in chrome_trace(profile.phases)["traceEvents"] if event["ph"] == "X"]
    loop = [event for event in events if event["tid"] == 1]
    for before, after in itertools.pairwise(loop):  # one after the other
        assert before["ts"] + before["dur"] <= after["ts"] + 0.2
    in_flight = {event["args"]["step"]: event for event in events if event["tid"] > 1}
    assert set(in_flight) == set(range(1, 11))
    overlap = [in_flight[k]["ts"] + in_flight[k]["dur"] > in_flight[k + 1]["ts"] + 1 for k in range(1, 10)]
    assert all(overlap) if max_in_flight == 2 else not any(overlap)
    assert {event["args"]["sequences"] for event in events} == {3}
    # What nobody waits for any more ends with what there is, also when nothing runs.
    core.profile(ProfileSteps(6, 10))
    assert not core.has_work
    core.profile(ProfileSteps(7, 0))  # of another
    assert not core.has_work
    core.profile(ProfileSteps(6, 0))
    assert core.has_work
    ended = core.step().profile
    assert ended is not None
    assert (ended.profile_id, ended.phases) == (6, ())
    core.shutdown()


async def test_without_keys_a_socket_is_open(tokenizer: Tokenizer) -> None:
    engine = OperatedEngine(HashingExecutor(64, 4))
    app = create_app(ServerConfig(), engine, tokenizer)
    admin = create_admin_app(LoneServer(app.state.service, engine), ApiKeys(()))
    transport = httpx.ASGITransport(admin, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/admin/status")).status_code == 200
    await app.state.service.close()


class SupervisorOfTwo:
    """Asks two applications of this process, where a real one asks processes."""

    def __init__(self, engine: OperatedEngine, *apps: FastAPI) -> None:
        self.engine = engine
        self._apps = apps
        self.established: dict[str, str] = {}

    async def ask(self, subject: str, argument: str = "") -> list[bytes]:
        return [answer_operator(app.state.service, subject, argument) for app in self._apps]

    async def establish(self, subject: str, argument: str) -> None:
        self.established[subject] = argument
        await self.ask(subject, argument)


async def test_several_api_processes_are_one_server(both: Both, tokenizer: Tokenizer) -> None:
    both.engine.pause = 0.005
    other = Both(both.engine, tokenizer, ServerConfig(admin_key=(api_key(KEY),)))
    supervisor = SupervisorOfTwo(both.engine, both.app, other.app)
    keys = ApiKeys((api_key(KEY),))
    admin_app = create_admin_app(OperatedWorkers(supervisor, ("m",)), keys)
    transport = httpx.ASGITransport(admin_app, raise_app_exceptions=False)
    before = log_level()
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=WITH_KEY) as admin:
        expected = await both.answer("first")
        asked = [("a", both), ("b", other), ("b", both)]
        running = [
            asyncio.create_task(
                one.main.post(
                    "/v1/completions",
                    json={"prompt": "first", "max_tokens": 60, "ignore_eos": True, "seed": 3},
                    headers={"x-request-id": name},
                )
            )
            for name, one in asked
        ]
        while len(data := (await admin.get("/admin/requests")).json()["data"]) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert sorted(call["x_request_id"] for call in data) == ["a", "b", "b"]
        status = (await admin.get("/admin/status")).json()
        assert (status["calls"], status["api_workers"], status["is_ready"]) == (3, 2, True)
        aborted = await admin.post("/admin/requests/b/abort", json={})
        assert sorted(aborted.json()["aborted"]) == sorted(
            call["id"] for call in data if call["x_request_id"] == "b"
        )
        assert (await admin.post("/admin/drain", json={})).json()["takes_requests"] is False
        for one in (both, other):
            assert (await one.main.get("/health/ready")).status_code == 503
        answers = await asyncio.gather(*running)
        assert [answer.status_code for answer in answers] == [200, 500, 500]
        assert answers[0].json()["choices"][0]["text"] == expected
        assert (await admin.post("/admin/undrain", json={})).json()["is_ready"] is True
        try:
            await admin.put("/admin/log_level", json={"level": "error"})
            assert supervisor.established == {"take_requests": "yes", "log_level": "error"}
        finally:
            set_log_level(before)
    await other.app.state.service.close()
