"""Valid bodies with one odd place: whatever it is, the answer is an answer or the client's error."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from scheduler.messages import EngineOutput, FinishReason, Request
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api
from tests.server.in_process_engine import SPEC, ScriptedEngine

_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/messages": {
        "model": MODEL,
        "max_tokens": 5,
        "system": [{"type": "text", "text": "S"}],
        "messages": [
            {"role": "user", "content": "A"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "T", "signature": "s"},
                    {"type": "text", "text": "B"},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"city": "C"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "D"}]}
                ],
            },
        ],
        "tools": [{"name": "f", "description": "d", "input_schema": _SCHEMA}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "stop_sequences": ["x"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stream": False,
        "metadata": {"user_id": "u"},
    },
    "/v1/responses": {
        "model": MODEL,
        "input": [
            {"role": "developer", "content": "S"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "A"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "T"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "fc_1"},
            {"type": "function_call_output", "call_id": "c1", "output": "D"},
        ],
        "instructions": "I",
        "max_output_tokens": 5,
        "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA, "strict": False}],
        "tool_choice": {
            "type": "allowed_tools",
            "mode": "auto",
            "tools": [{"type": "function", "name": "f"}],
        },
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": None},
        "metadata": {"a": "b"},
        "include": ["reasoning.encrypted_content"],
        "store": True,
        "stream": False,
        "temperature": 0.5,
    },
    "/v1/embeddings": {"model": MODEL, "input": ["A", "B"], "encoding_format": "float", "dimensions": 2},
}
ODD: list[Any] = [
    None, True, 0, -1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, "", "x", "\x00", "🙂" * 40, "a" * 5000, [],
    [[]], [None], ["x"], {}, {"type": "x"}, {"type": None}, {"type": "text"}, {"type": "text", "text": "x"},
    {"": ""}, {"role": "user"}, [{"type": "message"}], [1, 2, 3], "null", "resp_x", "<tool_call>",
    "<|im_end|>",
]  # fmt: skip
_PROBES = 350


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


def _made_odd(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    body = copy.deepcopy(body)
    *path, last = chance.choice(list(_places(body)))
    target: Any = body
    for key in path:
        target = target[key]
    match chance.randrange(4):
        case 0:
            del target[last]
        case 1 if isinstance(target, list):
            target.append(target[last])
        case _:
            target[last] = chance.choice(ODD)
    return body


@pytest.mark.parametrize("path", sorted(BODIES))
async def test_no_body_is_an_error_of_ours(tokenizer: Tokenizer, path: str) -> None:
    def script(request: Request) -> list[EngineOutput]:
        vector = (1.0, 2.0, 2.0) if request.params.pooling else None
        return [EngineOutput(request.request_id, (28,), finish_reason=FinishReason.LENGTH, embedding=vector)]

    engine = ScriptedEngine(script, replace(SPEC, embedding_size=3))
    chance = random.Random(path)
    statuses = set()
    async with api(engine, tokenizer) as client:
        assert (await client.post(path, json=BODIES[path])).status_code == 200
        for _ in range(_PROBES):
            body = _made_odd(BODIES[path], chance)
            response = await client.post(path, json=body)
            statuses.add(response.status_code)
            assert response.status_code < 500, json.dumps(body)
            if response.status_code != 200:
                error = response.json()["error"]
                assert error["message"]
                assert len(error["message"]) < 600
    assert statuses == {200, 400, 404}
