"""``/v1/embeddings``: what the engine is asked for, and how vectors are shown."""

from __future__ import annotations

import base64
import struct
from dataclasses import replace
from typing import Any

import pytest

from scheduler.messages import EngineOutput, FinishReason, Request
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api
from tests.server.in_process_engine import SPEC, ScriptedEngine

VECTOR = (3.0, 4.0, 12.0)
POOLING = replace(SPEC, embedding_size=3)


def _engine() -> ScriptedEngine:
    """Each prompt's vector ends with its number of tokens."""

    def script(request: Request) -> list[EngineOutput]:
        vector = (*VECTOR[:2], float(len(request.prompt_token_ids)))
        return [EngineOutput(request.request_id, (7,), embedding=vector, finish_reason=FinishReason.LENGTH)]

    return ScriptedEngine(script, POOLING)


async def _post(tokenizer: Tokenizer, engine: ScriptedEngine, **fields: Any) -> Any:
    async with api(engine, tokenizer) as client:
        response = await client.post("/v1/embeddings", json={"model": MODEL, **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def test_vectors_have_length_one(tokenizer: Tokenizer) -> None:
    engine = _engine()
    answer = await _post(tokenizer, engine, input=list(range(1, 13)))
    assert answer == {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": 0,
                "embedding": pytest.approx([3 / 13, 4 / 13, 12 / 13]),
            }
        ],
        "model": MODEL,
        "usage": {"prompt_tokens": 12, "total_tokens": 12},
    }
    [request] = engine.requests
    assert (request.params.pooling, request.params.max_tokens) == ("mean", 1)


async def test_fewer_dimensions_have_length_one_too(tokenizer: Tokenizer) -> None:
    answer = await _post(tokenizer, _engine(), input="Hi", dimensions=2)
    assert answer["data"][0]["embedding"] == pytest.approx([0.6, 0.8])


async def test_base64_holds_float32(tokenizer: Tokenizer) -> None:
    answer = await _post(tokenizer, _engine(), input=[[5] * 12], encoding_format="base64")
    data = base64.b64decode(answer["data"][0]["embedding"])
    assert struct.unpack("<3f", data) == pytest.approx([3 / 13, 4 / 13, 12 / 13])


async def test_several_texts_keep_their_order(tokenizer: Tokenizer) -> None:
    engine = _engine()
    texts = ["One", "two three four", "five six"]
    answer = await _post(tokenizer, engine, input=texts)
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert answer["usage"]["total_tokens"] == sum(lengths)
    found = [item["embedding"][2] / item["embedding"][0] * 3 for item in answer["data"]]
    assert found == pytest.approx(lengths)


async def test_the_kind_of_pooling_is_a_setting(tokenizer: Tokenizer) -> None:
    engine = _engine()
    async with api(engine, tokenizer, ServerConfig(pooling="last")) as client:
        await client.post("/v1/embeddings", json={"input": "Hi"})
    assert engine.requests[0].params.pooling == "last"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": [10**6]}, "input[0]"),
        ({"input": "word " * 2000}, "input"),
        ({"input": "Hi", "dimensions": 4}, "dimensions"),
        ({"input": "Hi", "dimensions": 0}, "dimensions"),
        ({"input": "Hi", "encoding_format": "int8"}, "encoding_format"),
    ],
)
async def test_what_is_refused(tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    engine = _engine()
    async with api(engine, tokenizer) as client:
        response = await client.post("/v1/embeddings", json=fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not engine.requests


async def test_a_device_that_does_not_pool(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(lambda request: [], SPEC)
    async with api(engine, tokenizer) as client:
        response = await client.post("/v1/embeddings", json={"input": "Hi"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "embeddings_not_supported"
