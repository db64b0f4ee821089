"""TGI's API, with Hugging Face's own client and without."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import GenerationError, OverloadedError, ValidationError

from scheduler.messages import EngineOutput, FinishReason, Request, TokenLogprobs
from server.app import create_app
from server.config import ServerConfig
from server.errors import EngineDeadError
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, serving
from tests.server.in_process_engine import SPEC, ScriptedEngine, tokens

PROMPT = "The capital"
TEXT = " of France is 🙂 Paris."


def _scripted(tokenizer: Tokenizer, *, with_eos: bool = False, text: str = TEXT) -> ScriptedEngine:
    """Generates ``text`` token by token, with the logprobs that were asked for."""
    eos = min(tokenizer.eos_token_ids)
    ids = [*tokenizer.encode(text), *([eos] if with_eos else [])]

    def script(request: Request) -> list[EngineOutput]:
        num_top = request.params.logprobs
        assert num_top is not None
        steps = ids[: request.params.max_tokens]
        end = FinishReason.STOP if with_eos and len(steps) == len(ids) else FinishReason.LENGTH
        prefill = None
        if request.params.prompt_logprobs is not None:
            prefill = tuple(TokenLogprobs(i, -2.0, 1) for i in request.prompt_token_ids[1:])
        return [
            EngineOutput(
                request.request_id,
                (token_id,),
                logprobs=(
                    TokenLogprobs(token_id, -1.0, 1, tuple((rank, -1.0 - rank) for rank in range(num_top))),
                ),
                prompt_logprobs=prefill if position == 0 else None,
                finish_reason=end if position == len(steps) - 1 else None,
            )
            for position, token_id in enumerate(steps)
        ]

    return ScriptedEngine(script)


@asynccontextmanager
async def _client(engine: ScriptedEngine, tokenizer: Tokenizer) -> AsyncIterator[AsyncInferenceClient]:
    async with (
        serving(create_app(ServerConfig(), engine, tokenizer)) as port,
        AsyncInferenceClient(f"http://127.0.0.1:{port}") as client,
    ):
        yield client


async def test_the_client_whole(tokenizer: Tokenizer) -> None:
    async with _client(_scripted(tokenizer, with_eos=True), tokenizer) as client:
        assert await client.text_generation(PROMPT) == TEXT
        assert await client.text_generation(PROMPT, return_full_text=True) == PROMPT + TEXT
        answer = await client.text_generation(
            PROMPT, details=True, decoder_input_details=True, top_n_tokens=2, seed=7, do_sample=True
        )
        details = answer.details
        assert details is not None
        ids = [*tokenizer.encode(TEXT), min(tokenizer.eos_token_ids)]
        assert (answer.generated_text, details.finish_reason) == (TEXT, "eos_token")
        assert [token.id for token in details.tokens] == ids
        assert (details.generated_tokens, details.seed) == (len(ids), 7)
        assert "".join(token.text for token in details.tokens if not token.special) == TEXT
        assert [token.special for token in details.tokens] == [False] * (len(ids) - 1) + [True]
        assert [token.id for token in details.prefill] == tokenizer.encode(PROMPT)
        assert [token.logprob for token in details.prefill] == [None, -2.0]
        assert details.top_tokens is not None
        assert [[token["id"] for token in top] for top in details.top_tokens] == [[0, 1]] * len(ids)


async def test_the_client_streaming(tokenizer: Tokenizer) -> None:
    async with _client(_scripted(tokenizer), tokenizer) as client:
        pieces = [piece async for piece in await client.text_generation(PROMPT, stream=True)]
        assert "".join(pieces) == TEXT
        outputs = [
            output
            async for output in await client.text_generation(
                PROMPT, stream=True, details=True, max_new_tokens=3, return_full_text=True
            )
        ]
        ids = tokenizer.encode(TEXT)[:3]
        assert [output.token.id for output in outputs] == ids
        assert [output.index for output in outputs] == [1, 2, 3]
        assert [output.generated_text for output in outputs[:-1]] == [None, None]
        last = outputs[-1]
        assert last.generated_text == PROMPT + tokenizer.decode(ids)
        assert last.details is not None
        assert (last.details.finish_reason, last.details.generated_tokens) == ("length", 3)
        assert last.details["input_length"] == len(tokenizer.encode(PROMPT))
        assert last.details.seed is None


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_is_the_end_of_the_text(tokenizer: Tokenizer, stream: bool) -> None:
    engine = _scripted(tokenizer)
    async with api(engine, tokenizer) as client:
        body = {"inputs": PROMPT, "parameters": {"stop": [" France is"], "details": True}}
        response = await client.post("/generate_stream" if stream else "/generate", json=body)
    answer = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data:"))
    assert answer["generated_text"] == " of France is"
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert engine.aborted


async def test_the_root_answers_both_ways(tokenizer: Tokenizer) -> None:
    async with api(_scripted(tokenizer), tokenizer) as client:
        whole = await client.post("/", json={"inputs": PROMPT})
        assert whole.json() == [{"generated_text": TEXT}]
        assert (await client.post("/generate", json={"inputs": PROMPT})).json() == whole.json()[0]
        stream = await client.post("/", json={"inputs": PROMPT, "stream": True})
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(event.removeprefix("data:")) for event in stream.text.strip().split("\n\n")]
        assert "".join(event["token"]["text"] for event in events) == TEXT
        assert (events[-1]["generated_text"], events[-1]["details"]) == (TEXT, None)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, {"temperature": 0.0, "max_tokens": 100, "logprobs": 0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 1.0}, {"temperature": 0.0}),
        ({"top_k": 5}, {"temperature": 1.0, "top_k": 5}),
        ({"top_p": 0.5, "seed": 3}, {"temperature": 1.0, "top_p": 0.5, "seed": 3}),
        (
            {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
            {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
        ),
        ({"watermark": False, "best_of": 1, "typical_p": None, "grammar": None}, {"temperature": 0.0}),
    ],
)
async def test_what_the_engine_is_asked_for(
    tokenizer: Tokenizer, parameters: dict[str, Any], expected: dict[str, Any]
) -> None:
    engine = _scripted(tokenizer)
    async with api(engine, tokenizer) as client:
        response = await client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
    assert response.status_code == 200
    assert {name: getattr(engine.requests[0].params, name) for name in expected} == expected


async def test_truncation_keeps_the_end(tokenizer: Tokenizer) -> None:
    engine = _scripted(tokenizer)
    long = "word " * 1000 + PROMPT
    async with api(engine, tokenizer) as client:
        response = await client.post("/generate", json={"inputs": long, "parameters": {"truncate": 7}})
        assert response.status_code == 200
        assert list(engine.requests[0].prompt_token_ids) == tokenizer.encode(long)[-7:]
        response = await client.post("/generate", json={"inputs": long})
        assert response.status_code == 422
        assert "inputs" in response.json()["error"]


@pytest.mark.parametrize(
    ("parameters", "status", "name"),
    [
        ({"typical_p": 0.9}, 400, "parameters.typical_p"),
        ({"watermark": True}, 400, "parameters.watermark"),
        ({"best_of": 2}, 400, "parameters.best_of"),
        ({"adapter_id": "a"}, 400, "parameters.adapter_id"),
        ({"temperature": 0}, 422, "parameters.temperature"),
        ({"max_new_tokens": 0}, 422, "parameters.max_new_tokens"),
        ({"max_new_tokens": 10**6}, 422, "max_new_tokens"),
        ({"top_p": 1.5}, 422, "parameters.top_p"),
        ({"seed": "1"}, 422, "parameters.seed"),
        ({"stop": "x"}, 422, "parameters.stop"),
        ({"top_n_tokens": 21}, 422, "parameters.top_n_tokens"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
async def test_what_is_refused(
    tokenizer: Tokenizer, parameters: dict[str, Any], status: int, name: str, path: str
) -> None:
    async with api(_scripted(tokenizer), tokenizer) as client:
        response = await client.post(path, json={"inputs": PROMPT, "parameters": parameters})
    assert response.status_code == status
    assert response.json().keys() == {"error", "error_type"}
    assert response.json()["error_type"] == "validation"
    assert name in response.json()["error"]


async def test_other_bodies_that_are_refused(tokenizer: Tokenizer) -> None:
    async with api(_scripted(tokenizer), tokenizer) as client:
        streamed = {"inputs": PROMPT, "parameters": {"decoder_input_details": True}}
        for path, body in (
            ("/generate", {}),
            ("/generate", {"inputs": ""}),
            ("/generate", {"inputs": ["a"]}),
            ("/generate_stream", streamed),
        ):
            response = await client.post(path, json=body)
            assert (response.status_code, response.json()["error_type"]) == (422, "validation")


async def test_errors_reach_the_client(tokenizer: Tokenizer) -> None:
    engine = _scripted(tokenizer)
    async with _client(engine, tokenizer) as client:
        with pytest.raises(ValidationError, match="temperature"):
            await client.text_generation(PROMPT, temperature=-1.0)
        with pytest.raises(ValidationError, match="typical_p"):
            await client.text_generation(PROMPT, typical_p=0.5)
        working = engine.script

        def breaks(request: Request) -> list[EngineOutput | Exception | asyncio.Event]:
            return [*list(working(request))[:2], RuntimeError("/secret/path")]

        engine.script = breaks
        stream = aiter(await client.text_generation(PROMPT, stream=True))
        pieces = [await anext(stream), await anext(stream)]
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode(TEXT)[:2])
        with pytest.raises(GenerationError) as caught:
            await anext(stream)
        assert "secret" not in str(caught.value)
        engine.script = lambda request: [EngineDeadError("/secret/path")]
        with pytest.raises(OverloadedError):
            await client.text_generation(PROMPT)
        engine.is_ready = False
        with pytest.raises(OverloadedError):
            await client.text_generation(PROMPT, stream=True)


@pytest.mark.parametrize("name", ["tgi", "dummy"])
async def test_what_clients_call_any_model(tokenizer: Tokenizer, name: str) -> None:
    engine = ScriptedEngine(tokens([1]))
    body = {"messages": [{"role": "user", "content": "Hi"}], "model": name}
    async with api(engine, tokenizer) as client:
        assert (await client.post("/v1/chat/completions", json=body)).json()["model"] == MODEL
        assert (await client.post("/v1/chat/completions", json=body | {"model": "x"})).status_code == 404


async def test_info(tokenizer: Tokenizer) -> None:
    async with api(_scripted(tokenizer), tokenizer) as client:
        about = (await client.get("/info")).json()
    assert (about["model_id"], about["max_total_tokens"]) == (MODEL, SPEC.max_model_len)
    assert about["max_input_tokens"] == SPEC.max_model_len - 1
