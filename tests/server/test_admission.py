"""The line in front of the engine: how long it gets, who comes next, and that nobody stays in it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest

from scheduler.hashing_executor import HashingExecutor
from scheduler.messages import EngineOutput, FinishReason, Request, SamplingParams
from server.admission import Admission
from server.api_keys import api_key, cache_scope
from server.config import ServerConfig
from server.engine_streams import EngineStreams
from server.errors import OverloadedError, QueueTimeoutError
from server.tokenizer import Tokenizer
from tests.server.http_client import api, chat
from tests.server.in_process_engine import SPEC, HashingEngine, ScriptedEngine

# 4 run, and 4 more are in the engine.
SMALL = replace(SPEC, max_num_seqs=4, max_num_batched_tokens=8)
KEYS = ServerConfig(api_key=(api_key("sk-a", "ann"), api_key("sk-b", "bob")))


class _Gate:
    """An engine whose requests begin and end when the test says so."""

    def __init__(self) -> None:
        self.ends: dict[str, asyncio.Event] = {}
        self.begins: dict[str, asyncio.Event] = {}
        self.engine = ScriptedEngine(self._script, SMALL)

    def _script(self, request: Request) -> list[EngineOutput | asyncio.Event]:
        begin = self.begins[request.request_id] = asyncio.Event()
        end = self.ends[request.request_id] = asyncio.Event()
        first = EngineOutput(request.request_id, (28,))
        return [begin, first, end, EngineOutput(request.request_id, finish_reason=FinishReason.STOP)]

    @property
    def ids(self) -> list[str]:
        """Of the requests that the engine got, in order."""
        return [request.request_id for request in self.engine.requests]

    def begin(self, request_id: str) -> None:
        self.begins[request_id].set()

    def finish(self, request_id: str) -> None:
        self.begin(request_id)
        self.ends[request_id].set()


async def _run(admission: Admission, gate: _Gate, requests: Sequence[Request], key: str | None) -> None:
    cache_scope.set(key)
    with admission.admit(requests):
        running = len(requests)
        async with contextlib.aclosing(EngineStreams(gate.engine, admission, requests).batches()) as batches:
            async for batch in batches:
                running -= sum(output.finish_reason is not None for _, output in batch)
                if not running:
                    return


def _start(
    admission: Admission, gate: _Gate, name: str, key: str | None = None, num_tokens: int = 1, **fields: Any
) -> asyncio.Task[None]:
    return asyncio.create_task(_run(admission, gate, [Request(name, (1,) * num_tokens, **fields)], key))


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def _is_empty(admission: Admission) -> bool:
    return (admission.num_waiting, admission.num_waiting_tokens, admission._num_held) == (0, 0, 0) and not (
        admission._places or admission._lines
    )


async def test_the_engine_gets_what_it_can_run_and_a_few_more() -> None:
    gate = _Gate()
    admission = Admission(ServerConfig(), gate.engine)
    tasks = [_start(admission, gate, f"r{i}") for i in range(20)]
    await _settle()
    assert gate.ids == [f"r{i}" for i in range(8)]
    assert admission.num_waiting == 12
    gate.finish("r3")
    tasks[9].cancel()  # a client that leaves while it waits
    await _settle()
    assert gate.ids[8:] == ["r8"]
    for name in [f"r{i}" for i in range(20) if i not in (3, 9)]:
        gate.finish(name)
        await _settle()
    assert gate.ids[9:] == [f"r{i}" for i in range(10, 20)]
    await asyncio.gather(*tasks, return_exceptions=True)
    assert _is_empty(admission)


async def test_priorities_hold_in_the_line() -> None:
    gate = _Gate()
    admission = Admission(ServerConfig(), gate.engine)
    tasks = [_start(admission, gate, f"r{i}", priority=-i) for i in range(12)]
    await _settle()
    assert gate.ids == [f"r{i}" for i in range(8)]  # they came first
    gate.finish("r0")
    await _settle()
    assert gate.ids[8:] == ["r11"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert _is_empty(admission)


async def test_a_key_that_floods_does_not_stand_before_the_others() -> None:
    gate = _Gate()
    admission = Admission(replace(KEYS, max_queued_requests=40), gate.engine)
    flood = [_start(admission, gate, f"a{i}", "ann") for i in range(30)]
    await _settle()
    assert len(gate.ids) == 6  # three quarters of the places
    other = [_start(admission, gate, f"b{i}", "bob") for i in range(4)]
    await _settle()
    assert gate.ids[6:] == ["b0", "b1"]
    gate.finish("a0")
    gate.finish("a1")
    await _settle()
    assert gate.ids[8:] == ["b2", "b3"]  # until both have four
    gate.finish("b0")
    await _settle()
    assert gate.ids[10:] == ["a6"]
    for task in flood + other:
        task.cancel()
    await asyncio.gather(*flood, *other, return_exceptions=True)
    assert _is_empty(admission)


async def test_a_flood_of_high_priority_does_not_starve_other_keys() -> None:
    gate = _Gate()
    admission = Admission(replace(KEYS, max_queued_requests=100), gate.engine)
    flood = [_start(admission, gate, f"a{i}", "ann", priority=-1000) for i in range(40)]
    await _settle()
    other = _start(admission, gate, "b", "bob")
    await _settle()
    position = gate.ids.index("b")  # it did not wait for any of the flood to end
    assert position == 6
    for task in (*flood, other):
        task.cancel()
    await asyncio.gather(*flood, other, return_exceptions=True)
    assert _is_empty(admission)


async def test_a_key_that_floods_leaves_room_in_the_line() -> None:
    gate = _Gate()
    admission = Admission(replace(KEYS, max_queued_requests=8, max_queued_tokens=1000), gate.engine)
    flood = [_start(admission, gate, f"a{i}", "ann") for i in range(12)]
    await _settle()
    assert admission.num_waiting == 6  # three quarters; six more are in the engine
    assert admission.refusal("ann") is not None
    assert admission.refusal("bob") is None
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    flood = [_start(admission, gate, f"A{i}", "ann", num_tokens=200) for i in range(5)]
    await _settle()
    assert admission.num_waiting_tokens == 600  # one is in the engine, the fifth would be over 750
    flood.append(_start(admission, gate, "b", "bob", num_tokens=390))
    await _settle()
    assert gate.ids[-1] == "b"
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    assert _is_empty(admission)


async def test_long_prompts_of_a_key_are_handed_over_bit_by_bit() -> None:
    gate = _Gate()
    admission = Admission(KEYS, gate.engine)
    flood = [_start(admission, gate, f"a{i}", "ann", num_tokens=30) for i in range(5)]
    await _settle()
    assert gate.ids == ["a0", "a1"]  # of 8 steps' 64 tokens
    gate.begin("a0")
    await _settle()
    assert gate.ids[2:] == ["a2"]
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    assert _is_empty(admission)


async def test_a_full_line_takes_nobody() -> None:
    gate = _Gate()
    admission = Admission(ServerConfig(max_queued_requests=3, max_queued_tokens=100), gate.engine)
    tasks = [_start(admission, gate, f"r{i}", num_tokens=10) for i in range(10)]
    await _settle()
    admission.check()
    with pytest.raises(OverloadedError) as caught, admission.admit([Request("long", (1,) * 81)]):
        pass
    assert (caught.value.type, caught.value.headers["x-ratelimit-remaining-tokens"]) == ("tokens", "80")
    with pytest.raises(OverloadedError), admission.admit([Request(f"n{i}", (1,)) for i in range(2)]):
        pass
    tasks.append(_start(admission, gate, "last", num_tokens=80))
    await _settle()
    with pytest.raises(OverloadedError) as caught:
        admission.check()
    assert caught.value.headers["x-ratelimit-limit-requests"] == "3"
    assert admission.rejections == {"requests": 2, "tokens": 1, "key": 0, "timeout": 0}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert _is_empty(admission)
    # Into an empty line comes any call, for it would never fit otherwise.
    with admission.admit([Request(f"n{i}", (1,) * 200) for i in range(50)]):
        assert admission.num_waiting == 42
    assert _is_empty(admission)


async def test_who_waits_too_long_is_told() -> None:
    gate = _Gate()
    admission = Admission(ServerConfig(queue_timeout=1), gate.engine)
    tasks = [_start(admission, gate, f"r{i}") for i in range(9)]
    began = time.monotonic()
    with pytest.raises(QueueTimeoutError) as caught:
        await tasks[8]
    assert 0.9 < time.monotonic() - began < 3
    assert 750 <= int(caught.value.headers["retry-after-ms"]) <= 1250
    assert admission.rejections["timeout"] == 1
    assert not any(task.done() for task in tasks[:8])  # they are being answered
    for task in tasks[:8]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert _is_empty(admission)


async def test_the_refused_come_back_one_after_the_other() -> None:
    gate = _Gate()
    admission = Admission(ServerConfig(max_queued_requests=4), gate.engine)
    with admission.admit([Request(f"r{i}", (1,)) for i in range(12)]):
        admission._ends.extend(100.0 + i / 2 for i in range(10))  # a place is free every half a second

        def wait() -> float:
            with pytest.raises(OverloadedError) as caught:
                admission.check()
            seconds = int(caught.value.headers["retry-after-ms"]) / 1000
            assert seconds <= int(caught.value.headers["retry-after"]) <= seconds + 1
            return seconds

        waits = [wait() for _ in range(115)]
        # Behind the four that wait, and at the rate at which places get free.
        assert waits == pytest.approx([2 + i / 2 for i in range(115)], abs=0.1)
        late = [wait() for _ in range(100)]
        # OpenAI's SDK does not believe in more than a minute, and comes back at once.
        assert all(30 <= seconds <= 60 for seconds in late)
        assert max(late) - min(late) > 15
    assert _is_empty(admission)


async def test_the_pause_before_a_burst_does_not_count_as_slowness() -> None:
    gate = _Gate()
    admission = Admission(ServerConfig(), gate.engine)
    with admission.admit([Request("long ago", (1,))]):
        pass
    admission._ends.extend([0.0] * len(admission._ends))
    with admission.admit([Request(f"r{i}", (1,)) for i in range(2)]):
        admission.end("r0")
        assert admission.interval == pytest.approx(0.1)  # one end tells nothing
        admission.end("r1")


async def test_nobody_stays_whatever_happens() -> None:
    dice = random.Random(7)
    executor = HashingExecutor(num_blocks=16, block_size=4, vocab_size=50, max_num_seqs=3)
    engine = HashingEngine(executor)
    admission = Admission(replace(KEYS, max_queued_requests=12, max_queued_tokens=60), engine)
    ends = {"whole": 0, "refused": 0, "cancelled": 0}

    async def client(number: int) -> None:
        cache_scope.set(dice.choice(["ann", "bob"]))
        requests = [
            Request(f"{number}-{i}", (1,) * dice.randint(1, 9), SamplingParams(max_tokens=dice.randint(1, 8)))
            for i in range(dice.choice([1, 1, 1, 2, 5]))
        ]
        try:
            with admission.admit(requests):
                running = set(range(len(requests)))
                streams = EngineStreams(engine, admission, requests)
                async with contextlib.aclosing(streams.batches()) as batches:
                    async for batch in batches:
                        running -= {index for index, output in batch if output.finish_reason is not None}
                        if not running:
                            ends["whole"] += 1
                            return
        except OverloadedError:
            ends["refused"] += 1

    async def impatient(number: int) -> None:
        task = asyncio.create_task(client(number))
        for _ in range(dice.randint(0, 60)):
            await asyncio.sleep(0)
        if dice.random() < 0.3 and task.cancel():
            ends["cancelled"] += 1
        with contextlib.suppress(asyncio.CancelledError):
            await task

    for start in range(0, 400, 20):
        async with asyncio.timeout(20):
            await asyncio.gather(*(impatient(number) for number in range(start, start + 20)))
    await _settle()
    assert _is_empty(admission)
    assert min(ends.values()) > 20
    while engine.core.has_work:
        engine.core.step()
    engine.core.check_invariants()
    assert engine.stats.kv_cache_usage == 0


# ---- over HTTP ----


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_what_a_refused_client_is_told_and_how_soon(tokenizer: Tokenizer) -> None:
    gate = _Gate()
    config = ServerConfig(max_queued_requests=2)
    async with api(gate.engine, tokenizer, config) as client:
        waiting = [asyncio.create_task(client.post("/v1/chat/completions", json=chat())) for _ in range(10)]
        await _until(lambda: len(gate.ids) == 8)
        await _settle()
        seconds: list[float] = []
        for path, body in (
            ("/v1/chat/completions", chat()),
            ("/v1/chat/completions", chat(stream=True)),
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/responses", {"model": chat()["model"], "input": "x"}),
            ("/v1/messages", chat(max_tokens=5)),
            ("/generate", {"inputs": "x"}),
        ):
            began = time.perf_counter()
            response = await client.post(path, json=body)
            seconds.append(time.perf_counter() - began)
            assert response.status_code == 429, (path, response.text)
            assert 1 <= int(response.headers["retry-after"]) <= 75
            assert 750 <= int(response.headers["retry-after-ms"]) <= 75_000
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == "0"
            assert response.headers["x-request-id"]
            if path == "/generate":
                assert response.json()["error_type"] == "overloaded"
            elif path == "/v1/messages":
                assert response.json()["error"]["type"] == "rate_limit_error"
            else:
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("requests", "server_overloaded")
        assert sorted(seconds)[len(seconds) // 2] < 0.05
        page = (await client.get("/metrics")).text
        assert 'inflightd:num_requests_waiting{engine="0",model_name="smollm2-135m-instruct"} 2.0' in page
        assert (await client.get("/health/ready")).status_code == 200
        while not all(task.done() for task in waiting):
            for name in gate.ids:
                gate.finish(name)
            await asyncio.sleep(0.001)
        assert {(await task).status_code for task in waiting} == {200}
        await _refused_are_no_requests(client)


async def test_an_answer_tells_how_much_more_is_taken(tokenizer: Tokenizer) -> None:
    gate = _Gate()
    async with api(gate.engine, tokenizer, ServerConfig(max_queued_requests=9)) as client:
        running = [asyncio.create_task(client.post("/v1/chat/completions", json=chat())) for _ in range(10)]
        await _until(lambda: len(gate.ids) == 8)
        await _settle()
        bodies = [chat(), chat(stream=True)]
        running += [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for body in bodies]
        while not all(task.done() for task in running):
            for name in gate.ids:
                gate.finish(name)
            await asyncio.sleep(0.001)
        for task in running[-2:]:
            headers = (await task).headers
            assert headers["x-ratelimit-limit-requests"] == "9"
            assert 6 <= int(headers["x-ratelimit-remaining-requests"]) <= 9
            assert headers["x-ratelimit-limit-tokens"] == str(128 * 8)
            assert int(headers["x-ratelimit-remaining-tokens"]) <= 128 * 8
            assert headers["x-ratelimit-reset-requests"].endswith("s")
        assert "x-ratelimit-limit-requests" not in (await client.get("/v1/models")).headers


async def _refused_are_no_requests(client: httpx.AsyncClient) -> None:
    page = (await client.get("/metrics")).text
    line = next(
        line for line in page.splitlines() if line.startswith("inflightd:e2e_request_latency_seconds_count")
    )
    assert float(line.split()[-1]) == 10


async def test_a_key_has_its_share(tokenizer: Tokenizer) -> None:
    gate = _Gate()
    async with api(gate.engine, tokenizer, replace(KEYS, max_requests_per_key=2)) as client:
        ann, bob = {"x-api-key": "sk-a"}, {"x-api-key": "sk-b"}
        running = [
            asyncio.create_task(client.post("/v1/chat/completions", json=chat(), headers=ann))
            for _ in range(2)
        ]
        await _until(lambda: len(gate.ids) == 2)
        refused = await client.post("/v1/chat/completions", json=chat(), headers=ann)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        running.append(asyncio.create_task(client.post("/v1/chat/completions", json=chat(), headers=bob)))
        await _until(lambda: len(gate.ids) == 3)
        for name in gate.ids:
            gate.finish(name)
        assert {(await task).status_code for task in running} == {200}
        last = asyncio.create_task(client.post("/v1/chat/completions", json=chat(), headers=ann))
        await _until(lambda: len(gate.ids) == 4)
        gate.finish(gate.ids[3])
        assert (await last).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_takes_too_long_ends(tokenizer: Tokenizer, stream: bool) -> None:
    executor = HashingExecutor(num_blocks=64, block_size=16, vocab_size=40_000, max_model_len=1000)
    engine = HashingEngine(executor)
    engine.pause = 0.01
    async with api(engine, tokenizer, ServerConfig(request_timeout=1)) as client:
        began = time.monotonic()
        body = {"prompt": [5, 6], "max_tokens": 900, "ignore_eos": True, "stream": stream}
        response = await client.post("/v1/completions", json=body)
        assert 0.9 < time.monotonic() - began < 3
        if stream:
            assert response.status_code == 200
            assert '"code":"request_timeout"' in response.text.strip().split("\n\n")[-1]
        else:
            assert response.status_code == 504
            assert response.headers["x-should-retry"] == "false"
        await _until(lambda: engine.stats.num_running == 0)
