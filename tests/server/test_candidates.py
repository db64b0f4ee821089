"""``best_of`` and ``use_beam_search``: more answers are generated than are shown."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.messages import EngineOutput, FinishReason, Request, TokenLogprobs
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, chat
from tests.server.in_process_engine import ScriptedEngine, tokens

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


async def _post(engine: ScriptedEngine, tokenizer: Tokenizer, path: str, **fields: Any) -> Any:
    body = chat(**fields) if path == CHAT else {"model": MODEL, "prompt": "One two", **fields}
    async with api(engine, tokenizer) as client:
        response = await client.post(path, json=body)
    return response.json() if response.status_code == 200 else response.json()["error"]


def _text(choice: dict[str, Any]) -> str:
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    assert isinstance(text, str)
    return text


def sampling(logprobs: list[list[float]]) -> ScriptedEngine:
    """Answers the request of each seed with so many tokens of these logprobs, after which it stops."""

    def script(request: Request) -> list[EngineOutput]:
        assert request.params.logprobs is not None
        seed = request.params.seed
        return [
            EngineOutput(
                request.request_id,
                (100 * seed + place,),
                (TokenLogprobs(100 * seed + place, logprob, 1),),
                finish_reason=FinishReason.LENGTH if place == len(logprobs[seed]) - 1 else None,
                num_cached_tokens=16 * (seed > 0),
            )
            for place, logprob in enumerate(logprobs[seed])
        ]

    return ScriptedEngine(script)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_the_best_of_several_samples(tokenizer: Tokenizer, path: str) -> None:
    engine = sampling([[-1.0, -2.0], [-0.5], [-0.5, -0.3], [-4.0]])
    answer = await _post(engine, tokenizer, path, best_of=4, n=2, seed=0)
    assert len(engine.requests) == 4
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    expected = [tokenizer.decode([100]), tokenizer.decode([200, 201])]
    assert [_text(choice) for choice in answer["choices"]] == expected
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["prompt_tokens"] == len(engine.requests[0].prompt_token_ids)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_the_best_for_each_of_several_prompts(tokenizer: Tokenizer) -> None:
    engine = sampling([[-1.0], [-0.5], [-0.7]])
    fields: dict[str, Any] = {"prompt": ["a", "b c"], "best_of": 3, "n": 2, "seed": 0}
    answer = await _post(engine, tokenizer, TEXT, echo=True, return_token_ids=True, logprobs=0, **fields)
    for index, (choice, prompt) in enumerate(zip(answer["choices"], ["a", "a", "b c", "b c"], strict=True)):
        token_id = 100 if index % 2 == 0 else 200
        assert choice["index"] == index
        assert choice["text"] == prompt + tokenizer.decode([token_id])
        assert choice["prompt_token_ids"] == tokenizer.encode(prompt)
        assert choice["logprobs"]["token_logprobs"][-1] == (-0.5 if index % 2 == 0 else -0.7)


async def test_as_many_as_are_shown_need_no_logprobs_and_may_be_streamed(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([1]))
    async with api(engine, tokenizer) as client:
        body = {"prompt": "a", "n": 2, "best_of": 2, "stream": True}
        assert (await client.post(TEXT, json=body)).status_code == 200
    assert [request.params.logprobs for request in engine.requests] == [None, None]


def branching(tokenizer: Tokenizer) -> ScriptedEngine:
    """ " one" is likelier than " two", but behind " two" the text ends at once."""
    [one], [two] = tokenizer.encode(" one"), tokenizer.encode(" two")
    eos = tokenizer.eos_token_ids[0]
    lengths: list[int] = []

    def script(request: Request) -> list[EngineOutput]:
        prompt = request.prompt_token_ids
        lengths.append(len(prompt))
        if len(prompt) == lengths[0]:
            top = ((one, -0.5), (two, -0.9), (7, -9.0), (8, -9.5))
        elif prompt[-1] == two:
            top = ((eos, -0.01), (7, -9.0), (8, -9.1), (9, -9.2))
        else:
            top = ((one, -0.75), (8, -0.8), (7, -9.0), (eos, -9.5))
        records = tuple(TokenLogprobs(token_id, -1.0, 1) for token_id in prompt[1:])
        return [
            EngineOutput(
                request.request_id,
                (top[0][0],),
                (TokenLogprobs(*top[0], 1, top),),
                records if request.params.prompt_logprobs is not None else None,
                FinishReason.LENGTH,
                num_cached_tokens=16 if len(prompt) == lengths[0] else 32,
            )
        ]

    return ScriptedEngine(script)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_beam_search(tokenizer: Tokenizer, path: str) -> None:
    engine = branching(tokenizer)
    answer = await _post(engine, tokenizer, path, use_beam_search=True, n=2, max_tokens=2)
    # Together: two and the end -0.91, one and one -1.25.
    texts = [_text(choice) for choice in answer["choices"]]
    assert texts == [" two", " one one"] if path == TEXT else ["two", "one one"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]
    num_prompt = len(engine.requests[0].prompt_token_ids)
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 4,
        "total_tokens": num_prompt + 4,
        "prompt_tokens_details": {"cached_tokens": 16},
    }
    for request in engine.requests:
        assert (request.params.temperature, request.params.logprobs) == (0.0, 4)
        assert request.params.stop_token_ids == ()


async def test_the_best_beams_of_a_wider_search(tokenizer: Tokenizer) -> None:
    fields: dict[str, Any] = {"use_beam_search": True, "best_of": 2, "max_tokens": 2, "temperature": 0.7}
    answer = await _post(branching(tokenizer), tokenizer, TEXT, logprobs=1, echo=True, **fields)
    [choice] = answer["choices"]
    prompt_length = answer["usage"]["prompt_tokens"]
    assert choice["text"] == "One two two"
    shown = choice["logprobs"]
    assert shown["token_logprobs"] == [None, *[-1.0] * (prompt_length - 1), -0.9, -0.01]
    assert shown["top_logprobs"][prompt_length] == {" one": -0.5, " two": -0.9}
    assert answer["usage"]["completion_tokens"] == 4


async def test_the_end_may_be_ignored_and_long_texts_be_preferred(tokenizer: Tokenizer) -> None:
    fields: dict[str, Any] = {"use_beam_search": True, "best_of": 2, "max_tokens": 2}
    answer = await _post(branching(tokenizer), tokenizer, TEXT, ignore_eos=True, **fields)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["text"].startswith(" two")
    longest = await _post(branching(tokenizer), tokenizer, TEXT, length_penalty=5, **fields)
    assert longest["choices"][0]["text"] == " one one"


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"best_of": 2, "n": 3}, "best_of", "integer_below_min_value"),
        ({"best_of": 21}, "best_of", "integer_above_max_value"),
        ({"best_of": 2, "stream": True}, "best_of", "invalid_value"),
        ({"length_penalty": 0.5}, "length_penalty", "invalid_value"),
        ({"length_penalty": 11, "use_beam_search": True}, "length_penalty", "decimal_above_max_value"),
        ({"early_stopping": True, "use_beam_search": True}, "early_stopping", "unsupported_parameter"),
        ({"n": 11, "use_beam_search": True}, "n", "integer_above_max_value"),
        ({"best_of": 11, "use_beam_search": True}, "best_of", "integer_above_max_value"),
        *(
            ({"use_beam_search": True, "n": 2, **other}, next(iter(other)), "invalid_value")
            for other in (
                {"stream": True}, {"stop": "a"}, {"stop": ["a"]}, {"min_tokens": 1}, {"presence_penalty": 1},
                {"frequency_penalty": 0.1}, {"repetition_penalty": 1.1}, {"logit_bias": {"5": 1}},
                {"bad_words": ["the"]}, {"allowed_token_ids": [5]},
            )
        ),
        (
            {"use_beam_search": True, "response_format": {"type": "json_object"}},
            "use_beam_search", "invalid_value",
        ),
    ],
)  # fmt: skip
async def test_what_does_not_fit_together(
    tokenizer: Tokenizer, path: str, fields: dict[str, Any], param: str, code: str
) -> None:
    engine = ScriptedEngine(tokens([1]))
    error = await _post(engine, tokenizer, path, **fields)
    assert (error.get("param"), error.get("code")) == (param, code), error
    assert engine.requests == []


async def test_fields_that_ask_for_nothing(tokenizer: Tokenizer) -> None:
    nothing = {
        "stream": False, "stop": [], "min_tokens": 0, "presence_penalty": 0, "frequency_penalty": 0,
        "repetition_penalty": 1, "logit_bias": {}, "bad_words": [], "early_stopping": False,
    }  # fmt: skip
    answer = await _post(
        branching(tokenizer), tokenizer, CHAT, use_beam_search=True, n=2, max_tokens=2, **nothing
    )
    assert len(answer["choices"]) == 2
    answer = await _post(
        ScriptedEngine(tokens([5])), tokenizer, TEXT, use_beam_search=False, length_penalty=1
    )
    assert len(answer["choices"]) == 1


async def test_too_many_candidates_for_all_prompts(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([1]))
    error = await _post(engine, tokenizer, TEXT, prompt=["a"] * 200, best_of=6)
    assert (error["param"], error["code"]) == ("best_of", "integer_above_max_value")
    assert engine.requests == []


async def test_an_engine_that_fails_a_beam(tokenizer: Tokenizer) -> None:
    def script(request: Request) -> list[EngineOutput]:
        return [EngineOutput(request.request_id, finish_reason=FinishReason.ERROR, error="broken")]

    fields: dict[str, Any] = {"use_beam_search": True, "n": 2, "prompt": ["a", "b", "c"]}
    error = await _post(ScriptedEngine(script), tokenizer, TEXT, **fields)
    assert error["type"] == "server_error"
