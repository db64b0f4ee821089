"""Every abuse beside streams that go on: none of them may notice, and nothing may stay behind.

``INFLIGHTD_FULL_SIZES=1`` takes more streams, more rounds, and the abuses that take seconds by themselves.
"""

from __future__ import annotations

import asyncio
import json
import random

import httpx

from tests.end_to_end.server_process import ServerProcess
from tests.robustness.abuses import ABUSES, SLOW
from tests.robustness.sse_client import post, responding
from tests.sizes import size

_PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):", "1, 2, 3, 4,")
_AT_ONCE = 4


def _body(index: int) -> dict[str, object]:
    prompt = _PROMPTS[index % len(_PROMPTS)]
    return {"prompt": f"{index}. {prompt}", "max_tokens": 48, "temperature": 0, "ignore_eos": True}


async def _streamed(url: str, index: int) -> tuple[list[int], str, str]:
    """Tokens, text and finish reason of a stream, which has to be whole."""
    body = _body(index) | {"stream": True, "return_token_ids": True}
    async with responding(url, post("/v1/completions", body)) as response:
        assert response.status == 200
        *events, done = [event async for event in response.events()]
    assert done == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    token_ids = [token_id for choice in choices for token_id in choice["token_ids"] or ()]
    return token_ids, "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


async def test_abuses_beside_streams(server: ServerProcess) -> None:
    num_streams, num_rounds = size(3, 16), size(1, 20)
    quiet = [await _streamed(server.url, index) for index in range(num_streams)]
    assert [len(token_ids) for token_ids, _, _ in quiet] == [48] * num_streams
    done = asyncio.Event()
    num_whole = 0

    async def canary(index: int) -> None:
        nonlocal num_whole
        while not done.is_set():
            token_ids, text, reason = await _streamed(server.url, index)
            assert len(token_ids) == 48
            assert reason == "length"
            assert (token_ids, text, reason) == quiet[index] or not server.is_exact
            num_whole += 1

    names = [name for name in ABUSES if name not in SLOW or num_rounds > 1] * num_rounds
    chance = random.Random(5)
    chance.shuffle(names)
    places = asyncio.Semaphore(_AT_ONCE)

    async def abuse(name: str, client: httpx.AsyncClient) -> None:
        async with places:
            await ABUSES[name](server.url, chance)
            assert (await client.get("/health/live")).status_code == 200, name

    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        canaries = [asyncio.create_task(canary(index)) for index in range(num_streams)]
        await asyncio.gather(*(abuse(name, client) for name in names))
        assert not any(task.done() for task in canaries)
        done.set()
        await asyncio.gather(*canaries)
    assert num_whole >= num_streams
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        await asyncio.to_thread(server.wait_until, name, 0)
    assert server.metric("engine_restarts_total") == 0
    assert server.process.poll() is None
