"""Fields of vLLM's that both chat and text completions have."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.messages import EngineOutput, FinishReason, Request, TokenLogprobs
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, chat, events
from tests.server.in_process_engine import SPEC, ScriptedEngine, tokens

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


async def _post(engine: ScriptedEngine, tokenizer: Tokenizer, path: str, **fields: Any) -> Any:
    body = chat(**fields) if path == CHAT else {"model": MODEL, "prompt": "One two three", **fields}
    async with api(engine, tokenizer) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return events(response.text)[:-1] if fields.get("stream") else response.json()


@pytest.mark.parametrize(("path", "prefix"), [(CHAT, "chatcmpl-"), (TEXT, "cmpl-")])
async def test_a_request_id_names_the_answer_but_not_the_request(
    tokenizer: Tokenizer, path: str, prefix: str
) -> None:
    engine = ScriptedEngine(tokens([5]))
    for _ in range(2):
        assert (await _post(engine, tokenizer, path, request_id="mine.1"))["id"] == f"{prefix}mine.1"
    first, second = (request.request_id for request in engine.requests)
    assert first != second
    assert "mine" not in first


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_prompts_are_cut_from_their_beginning(tokenizer: Tokenizer, path: str) -> None:
    engine = ScriptedEngine(tokens([5]))
    long = "word " * 1000
    fields = {"content": long} if path == CHAT else {"prompt": long}
    await _post(engine, tokenizer, path, truncate_prompt_tokens=7, max_tokens=3, **fields)
    messages = [{"role": "user", "content": long}]
    whole = tokenizer.encode_chat(messages) if path == CHAT else tokenizer.encode(long)
    assert engine.requests[-1].prompt_token_ids == tuple(whole[-7:])
    await _post(engine, tokenizer, path, truncate_prompt_tokens=-1, max_tokens=30, **fields)
    assert engine.requests[-1].prompt_token_ids == tuple(whole[-(SPEC.max_model_len - 30) :])
    await _post(engine, tokenizer, path, truncate_prompt_tokens=100_000)
    assert len(engine.requests[-1].prompt_token_ids) < 60


async def test_an_echo_is_of_what_is_left(tokenizer: Tokenizer) -> None:
    answer = await _post(ScriptedEngine(tokens([5])), tokenizer, TEXT, truncate_prompt_tokens=2, echo=True)
    assert answer["choices"][0]["text"] == " two three" + tokenizer.decode([5])


async def test_tokens_that_may_and_may_not_come(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([5]))
    await _post(
        engine, tokenizer, CHAT, allowed_token_ids=[5, 6, 5], bad_words=["the"], logit_bias={"6": -2, "7": 1}
    )
    biases = dict(engine.requests[0].params.logit_bias)
    [alone], [spaced] = tokenizer.encode("the"), tokenizer.encode(" the")
    assert biases == {5: 1000.0, 6: 998.0, 7: 1.0, alone: -10_000.0, spaced: -10_000.0}


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_the_usage_so_far(tokenizer: Tokenizer, path: str) -> None:
    one, two, three, four = tokenizer.encode(" one two three four")
    engine = ScriptedEngine(tokens([one], [two, three], [four]))
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await _post(engine, tokenizer, path, stream=True, stream_options=options)
    num_prompt = len(engine.requests[0].prompt_token_ids)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert set(counts) == {1, 3, 4}
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {num_prompt}
    chunks = await _post(
        engine, tokenizer, path, stream=True, stream_options={"continuous_usage_stats": True}
    )
    assert not any("usage" in chunk for chunk in chunks)


async def test_token_ids_of_a_chat(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(" one two three"), tokenizer.eos_token_ids[0]]
    engine = ScriptedEngine(tokens(ids[:1], ids[1:3], ids[3:], finish=FinishReason.STOP))
    whole = await _post(engine, tokenizer, CHAT, return_token_ids=True)
    prompt = list(engine.requests[0].prompt_token_ids)
    assert whole["prompt_token_ids"] == prompt
    assert whole["choices"][0]["token_ids"] == ids
    chunks = await _post(engine, tokenizer, CHAT, return_token_ids=True, stream=True)
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [prompt, *[None] * (len(chunks) - 1)]
    streamed = [i for chunk in chunks for i in chunk["choices"][0]["token_ids"] or []]
    assert streamed == ids


async def test_token_ids_of_a_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" one two three")
    engine = ScriptedEngine(tokens(ids[:1], ids[1:]))
    whole = await _post(engine, tokenizer, TEXT, return_token_ids=True, prompt=["a", "b c"])
    for choice, prompt in zip(whole["choices"], ("a", "b c"), strict=True):
        assert choice["token_ids"] == ids
        assert choice["prompt_token_ids"] == tokenizer.encode(prompt)
    chunks = await _post(engine, tokenizer, TEXT, return_token_ids=True, stream=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [i for choice in choices for i in choice["token_ids"]] == ids
    assert [choice["prompt_token_ids"] is None for choice in choices] == [False] + [True] * (len(choices) - 1)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_logprobs_of_the_prompt(tokenizer: Tokenizer, path: str) -> None:
    def script(request: Request) -> list[EngineOutput]:
        assert request.params.prompt_logprobs == 2
        records = tuple(
            TokenLogprobs(token_id, -3.0, 9, ((11, -0.5), (12, float("-inf"))))
            for token_id in request.prompt_token_ids[1:]
        )
        return [
            EngineOutput(request.request_id, (5,), prompt_logprobs=records, finish_reason=FinishReason.LENGTH)
        ]

    engine = ScriptedEngine(script)
    answer = await _post(engine, tokenizer, path, prompt_logprobs=2)
    first, *others = answer["prompt_logprobs"] if path == CHAT else answer["choices"][0]["prompt_logprobs"]
    assert first is None
    for token_id, shown in zip(engine.requests[0].prompt_token_ids[1:], others, strict=True):
        assert shown[str(token_id)]["logprob"] == (-0.5 if token_id == 11 else -3.0)
        assert shown["11"] == {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.token_text(11)}
        assert shown["12"]["logprob"] == -9999.0
    assert answer["usage"]["completion_tokens"] == 1


async def test_a_text_without_special_tokens(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([5]))
    await _post(engine, tokenizer, TEXT, add_special_tokens=False, spaces_between_special_tokens=False)
    expected = tokenizer.encode("One two three", add_special_tokens=False)
    assert engine.requests[0].prompt_token_ids == tuple(expected)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_tokens_called_by_their_ids(tokenizer: Tokenizer, path: str) -> None:
    def script(request: Request) -> list[EngineOutput]:
        record = TokenLogprobs(5, -0.5, 1, ((5, -0.5), (11, -2.0)))
        return [EngineOutput(request.request_id, (5,), (record,), finish_reason=FinishReason.LENGTH)]

    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    answer = await _post(ScriptedEngine(script), tokenizer, path, return_tokens_as_token_ids=True, **fields)
    shown = answer["choices"][0]["logprobs"]
    if path == CHAT:
        [token] = shown["content"]
        assert (token["token"], bytes(token["bytes"])) == ("token_id:5", tokenizer.token_bytes(5))
        assert [top["token"] for top in token["top_logprobs"]] == ["token_id:5", "token_id:11"]
    else:
        assert shown["tokens"] == ["token_id:5"]
        assert shown["top_logprobs"] == [{"token_id:5": -0.5, "token_id:11": -2.0}]


@pytest.mark.parametrize(
    ("role", "fields", "echoed"),
    [
        ("user", {}, ""),
        ("user", {"add_generation_prompt": False}, "The sky is"),
        ("assistant", {}, "The sky is"),
        ("assistant", {"add_generation_prompt": False, "continue_final_message": True}, "The sky is"),
    ],
)
async def test_a_chat_that_echoes_its_last_message(
    tokenizer: Tokenizer, role: str, fields: dict[str, Any], echoed: str
) -> None:
    ids = tokenizer.encode(" blue")
    content = [{"type": "text", "text": "The sky is"}]
    fields = {"messages": [{"role": role, "content": content}], "echo": True, "n": 2, **fields}
    whole = await _post(ScriptedEngine(tokens(ids)), tokenizer, CHAT, **fields)
    expected = echoed + tokenizer.decode(ids)
    assert [choice["message"]["content"] for choice in whole["choices"]] == [expected] * 2
    assert whole["usage"]["completion_tokens"] == 2 * len(ids)
    chunks = await _post(ScriptedEngine(tokens(ids)), tokenizer, CHAT, stream=True, **fields)
    for index in range(2):
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(delta.get("content", "") for delta in deltas) == expected
        assert deltas[0] == {"role": "assistant", "content": ""}
