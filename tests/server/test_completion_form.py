from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import pytest

from scheduler.messages import EngineOutput, FinishReason, Request, TokenLogprobs
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, events
from tests.server.in_process_engine import ScriptedEngine, tokens


def _completion(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, **fields}


async def test_a_stream_to_the_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" is blue")
    async with api(ScriptedEngine(tokens(*([i] for i in ids))), tokenizer) as client:
        response = await client.post("/v1/completions", json=_completion("The sky", stream=True))
    found = re.search(r'"id":"(cmpl-[0-9a-f]{32})".*?"created":(\d+)', response.text)
    assert found is not None
    fingerprint = "fp_" + hashlib.sha256(b"0.1.0 scripted none").hexdigest()[:10]
    expected = "".join(
        f'data: {{"id":"{found[1]}","object":"text_completion","created":{found[2]},"model":"{MODEL}",'
        f'"system_fingerprint":"{fingerprint}","choices":[{{"text":{json.dumps(text)},"index":0,'
        f'"logprobs":null,"finish_reason":{reason}}}]}}\n\n'
        for text, reason in ((" is", "null"), (" blue", "null"), ("", '"length"'))
    )
    assert response.text == expected + "data: [DONE]\n\n"


def _scored(tokenizer: Tokenizer, text: str) -> ScriptedEngine:
    """Answers ``text``. The logprob of a token is minus a hundredth of its id."""
    ids = tokenizer.encode(text)

    def described(token_id: int) -> TokenLogprobs:
        return TokenLogprobs(token_id, -token_id / 100, 2, ((9, -0.25), (10, -1.5)))

    def script(request: Request) -> list[EngineOutput]:
        params = request.params
        answer = ids[: params.max_tokens]
        outputs = [
            EngineOutput(
                request.request_id,
                (token_id,),
                logprobs=None if params.logprobs is None else (described(token_id),),
                finish_reason=FinishReason.LENGTH if index == len(answer) - 1 else None,
            )
            for index, token_id in enumerate(answer)
        ]
        if params.prompt_logprobs is not None:
            prompt = tuple(map(described, request.prompt_token_ids[1:]))
            first = outputs[0]
            outputs[0] = EngineOutput(
                first.request_id, first.token_ids, first.logprobs, prompt, first.finish_reason
            )
        return outputs

    return ScriptedEngine(script)


def _merged(chunks: list[Any]) -> dict[str, Any]:
    """The choice that the chunks of a stream add up to."""
    merged: dict[str, Any] = {"text": "", "logprobs": None, "finish_reason": None}
    for chunk in chunks:
        choice = chunk["choices"][0]
        merged["text"] += choice["text"]
        merged["finish_reason"] = choice["finish_reason"] or merged["finish_reason"]
        for name, values in (choice["logprobs"] or {}).items():
            merged["logprobs"] = merged["logprobs"] or {}
            merged["logprobs"][name] = merged["logprobs"].get(name, []) + values
    return merged


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_echo_with_logprobs(tokenizer: Tokenizer, stream: bool, as_ids: bool) -> None:
    text, answer = "One ü😀 two", " three four"
    prompt_ids, answer_ids = tokenizer.encode(text), tokenizer.encode(answer)
    body = _completion(
        prompt_ids if as_ids else text, echo=True, logprobs=1, max_tokens=len(answer_ids), stream=stream
    )
    async with api(_scored(tokenizer, answer), tokenizer) as client:
        response = await client.post("/v1/completions", json=body)
    choice = _merged(events(response.text)[:-1]) if stream else response.json()["choices"][0]
    assert choice["text"] == text + answer
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    ids = prompt_ids + answer_ids
    assert logprobs["token_logprobs"] == [None, *(-i / 100 for i in ids[1:])]
    assert len(logprobs["tokens"]) == len(ids)
    # Worked out the slow way: characters that are complete before each token.
    data = [tokenizer.token_bytes(i) for i in ids]
    offsets = [len(b"".join(data[:k]).decode("utf-8", "ignore")) for k in range(len(data))]
    assert logprobs["text_offset"] == offsets
    parts = [token for token in logprobs["tokens"] if token.startswith("bytes:")]
    assert len(parts) >= 3
    shown = b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) if token in parts else token.encode()
        for token in logprobs["tokens"]
    )
    assert shown.decode() == text + answer
    # Only one alternative was asked for; the token itself is always among them.
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][-1] == {
        tokenizer.token_text(9): -0.25,
        tokenizer.token_text(ids[-1]): -ids[-1] / 100,
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_scoring_a_prompt_generates_nothing(tokenizer: Tokenizer, stream: bool) -> None:
    prompt_ids = tokenizer.encode("One two three")
    engine = _scored(tokenizer, " never seen")
    body = _completion("One two three", echo=True, logprobs=0, max_tokens=0, stream=stream)
    if stream:
        body["stream_options"] = {"include_usage": True}
    async with api(engine, tokenizer) as client:
        response = await client.post("/v1/completions", json=body)
    if stream:
        *chunks, last, _ = events(response.text)
        choice, usage = _merged(chunks), last["usage"]
    else:
        choice, usage = response.json()["choices"][0], response.json()["usage"]
    assert choice["text"] == "One two three"
    assert choice["logprobs"]["token_logprobs"] == [None, *(-i / 100 for i in prompt_ids[1:])]
    assert usage["completion_tokens"] == 0
    assert engine.requests[0].params.max_tokens == 1


async def test_prompts_in_all_four_forms(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello there")
    forms = ("Hello there", ["Hello there"] * 2, ids, [ids, ids])
    engine = ScriptedEngine(tokens([28]))
    async with api(engine, tokenizer) as client:
        for prompt in forms:
            answer = (await client.post("/v1/completions", json=_completion(prompt))).json()
            num_prompts = 2 if prompt in (forms[1], forms[3]) else 1
            assert [choice["index"] for choice in answer["choices"]] == list(range(num_prompts))
            assert answer["usage"]["prompt_tokens"] == num_prompts * len(ids)
    assert {request.prompt_token_ids for request in engine.requests} == {tuple(ids)}


async def test_choices_of_several_prompts_are_in_order(tokenizer: Tokenizer) -> None:
    async with api(_scored(tokenizer, " x"), tokenizer) as client:
        body = _completion(["a", "b"], n=2, echo=True, max_tokens=1)
        answer = (await client.post("/v1/completions", json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["a x", "a x", "b x", "b x"]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("skip", [True, False])
async def test_tokens_that_are_not_shown_take_no_place(tokenizer: Tokenizer, skip: bool) -> None:
    special = min(tokenizer.special_token_ids)
    name = tokenizer.token_text(special)
    body = _completion("x", max_tokens=8, logprobs=0, skip_special_tokens=skip)
    async with api(_scored(tokenizer, f"a{name}b"), tokenizer) as client:
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["text"] == ("ab" if skip else f"a{name}b")
    assert choice["logprobs"]["tokens"] == ["a", name, "b"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1 if skip else 1 + len(name)]
