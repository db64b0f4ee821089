"""From the engine's outputs to what the client reads, with a real scheduler in between."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.hashing_executor import HashingExecutor, run_alone
from scheduler.messages import EngineOutput, FinishReason, Request, SamplingParams
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, events
from tests.server.in_process_engine import HashingEngine, ScriptedEngine, tokens

BLOCKS, BLOCK_SIZE = 64, 4


def _engine(tokenizer: Tokenizer, steps_at_once: int = 1) -> HashingEngine:
    executor = HashingExecutor(
        BLOCKS, BLOCK_SIZE, vocab_size=tokenizer.vocab_size, max_num_batched_tokens=32, max_model_len=200
    )
    return HashingEngine(executor, steps_at_once)


def _texts(chunks: list[Any], num_choices: int) -> list[str]:
    texts = [""] * num_choices
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


async def _post(client: httpx.AsyncClient, **fields: Any) -> Any:
    response = await client.post("/v1/completions", json={"model": MODEL, **fields})
    assert response.status_code == 200, response.text
    return events(response.text) if fields.get("stream") else response.json()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**40),
    n=st.integers(1, 3),
    max_tokens=st.integers(1, 40),
    steps_at_once=st.integers(1, 5),
    stop=st.lists(st.sampled_from(["a", "e", " ", "th", "\ufffd", "s\u00e9", "in"]), max_size=3),
    include_stop=st.booleans(),
)
def test_streamed_or_whole_the_text_is_what_the_tokens_say(
    tokenizer: Tokenizer,
    seed: int,
    n: int,
    max_tokens: int,
    steps_at_once: int,
    stop: list[str],
    include_stop: bool,
) -> None:
    engine = _engine(tokenizer, steps_at_once)
    fields: dict[str, Any] = {
        "prompt": "One two three four five",
        "n": n,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": stop,
        "include_stop_str_in_output": include_stop,
        "ignore_eos": True,
    }

    async def ask() -> tuple[Any, Any]:
        async with api(engine, tokenizer) as client:
            whole = await _post(client, **fields)
            streamed = await _post(client, **fields, stream=True, stream_options={"include_usage": True})
        return whole, streamed

    whole, (*chunks, last, done) = asyncio.run(ask())
    assert done == "[DONE]"
    prompt = tuple(tokenizer.encode(fields["prompt"]))
    for index, choice in enumerate(whole["choices"]):
        # What the model says, from the whole list of its tokens at once.
        params = SamplingParams(seed=seed + index, max_tokens=max_tokens)
        token_ids, _ = run_alone(Request("alone", prompt, params), engine.spec)
        text = tokenizer.decode([*prompt, *token_ids])[len(fields["prompt"]) :]
        ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
        reason = "length"
        if ends:
            end, _, found = min(ends)
            text = text[:end] if include_stop else text[: end - len(found)]
            reason = "stop"
        assert choice["text"] == text
        assert choice["finish_reason"] == reason
    assert _texts(chunks, n) == [choice["text"] for choice in whole["choices"]]
    reasons = sorted(
        (choice["index"], choice["finish_reason"])
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"] is not None
    )
    assert reasons == [(choice["index"], choice["finish_reason"]) for choice in whole["choices"]]
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    # The second run found the first one's prompt: 4 full blocks of 4, but never the whole prompt.
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == (len(prompt) - 1) // 4 * 4
    engine.core.check_invariants()
    assert engine.stats.num_running == engine.stats.num_waiting == 0


async def test_many_at_once_are_what_each_is_alone(tokenizer: Tokenizer) -> None:
    engine = _engine(tokenizer)
    async with api(engine, tokenizer) as client:

        async def ask(seed: int) -> str:
            fields = {"prompt": f"Seed {seed}", "seed": seed, "max_tokens": 20, "ignore_eos": True}
            chunks = await _post(client, **fields, stream=True)
            return _texts(chunks[:-1], 1)[0]

        together = await asyncio.gather(*map(ask, range(24)))
        assert [await ask(seed) for seed in range(24)] == together
    assert len(set(together)) == 24


async def test_a_stop_string_ends_the_request_in_the_engine(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" one two three four")
    never = asyncio.Event()
    for n in (1, 2):
        engine = ScriptedEngine(lambda request: [*tokens(*([i] for i in ids[:3]))(request)[:-1], never])
        async with api(engine, tokenizer) as client:
            answer = await _post(client, prompt="x", stop=[" two", "never"], n=n, max_tokens=9)
            assert [choice["text"] for choice in answer["choices"]] == [" one"] * n
            assert answer["usage"]["completion_tokens"] == 2 * n
            assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)


async def test_tokens_after_a_stop_string_count_for_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" one two three four")
    async with api(ScriptedEngine(tokens(ids)), tokenizer) as client:  # all in one step
        answer = await _post(client, prompt="x", stop=" two", max_tokens=9)
    assert answer["choices"][0]["text"] == " one"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 2


async def test_a_stop_token_is_no_text_but_counts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" one two")
    engine = ScriptedEngine(tokens(ids, finish=FinishReason.STOP))
    async with api(engine, tokenizer) as client:
        answer = await _post(client, prompt="x", stop_token_ids=[ids[-1]])
    assert engine.requests[0].params.stop_token_ids == (ids[-1], *tokenizer.eos_token_ids)
    assert answer["choices"][0]["text"] == " one"
    assert answer["usage"]["completion_tokens"] == 2


async def test_special_tokens_are_shown_on_request(tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_token_ids)
    async with api(ScriptedEngine(tokens([special, 28])), tokenizer) as client:
        assert (await _post(client, prompt="x"))["choices"][0]["text"] == ","
        shown = await _post(client, prompt="x", skip_special_tokens=False)
        assert shown["choices"][0]["text"] == tokenizer.token_text(special) + ","


async def test_what_arrives_together_goes_out_in_one_chunk(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" one two three")
    async with api(ScriptedEngine(tokens(ids)), tokenizer) as client:
        chunks = await _post(client, prompt="x", stream=True)
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == [" one two three", ""]


async def test_all_chunks_share_their_identity(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([28], [28], [28])), tokenizer) as client:
        first, second = [(await _post(client, prompt=["x", "y"], n=2, stream=True))[:-1] for _ in range(2)]
    identities = [{(c["id"], c["created"], c["system_fingerprint"]) for c in run} for run in (first, second)]
    assert len(identities[0]) == len(identities[1]) == 1
    assert identities[0] != identities[1]


async def test_one_choice_fails_and_the_call_fails(tokenizer: Tokenizer) -> None:
    waits_for_ever = asyncio.Event()

    def script(request: Request) -> list[EngineOutput | asyncio.Event]:
        if request.request_id.endswith("-1"):
            return [EngineOutput(request.request_id, finish_reason=FinishReason.ERROR, error="NaN")]
        return [waits_for_ever]

    engine = ScriptedEngine(script)
    async with api(engine, tokenizer) as client:
        response = await client.post("/v1/completions", json={"prompt": "x", "n": 3})
        assert response.status_code == 500
        assert "NaN" not in response.text
        await asyncio.sleep(0)
    assert len(engine.aborted) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_seeds_of_choices(tokenizer: Tokenizer, stream: bool) -> None:
    engine = ScriptedEngine(tokens([28]))
    async with api(engine, tokenizer) as client:
        await _post(client, prompt=["x", "y"], n=2, seed=2**63 - 1, stream=stream)
        await _post(client, prompt="x", n=2, stream=stream)
    seeds = [request.params.seed for request in engine.requests]
    assert seeds[:4] == [2**63 - 1, 0, 2**63 - 1, 0]
    assert seeds[5] == (seeds[4] + 1) % 2**63
    assert len({request.request_id for request in engine.requests}) == 6
