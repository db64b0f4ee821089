"""Tools with the official OpenAI client against a real server process: the small default model calls them,
since a grammar makes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.end_to_end.server_process import ServerProcess

MODEL = "smollm2-135m-instruct"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 40},
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "unit", "days"],
        },
        "strict": True,
    },
}
TIME: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "maxLength": 20}},
            "required": ["zone"],
        },
    },
}
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def _check(name: str, arguments: str) -> None:
    given = json.loads(arguments)
    if name == "get_time":
        assert list(given) == ["zone"]
        return
    assert name == "get_weather"
    assert set(given) == {"city", "unit", "days"}
    assert given["unit"] in ("celsius", "fahrenheit")
    assert 1 <= given["days"] <= 9


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_required_calls_keep_to_the_schema(client: OpenAI, temperature: float) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[WEATHER, TIME],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=temperature,
        seed=3,
        max_tokens=200,
    )
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    _check(call.function.name, call.function.arguments)


def test_a_stream_equals_the_whole(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": QUESTION,
        "tools": [WEATHER, TIME],
        "tool_choice": {"type": "function", "function": {"name": "get_time"}},
        "temperature": 0,
        "max_tokens": 200,
    }
    whole = client.chat.completions.create(**options).choices[0].message.tool_calls
    assert whole is not None
    chunks = list(client.chat.completions.create(**options, stream=True))
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [piece.index for piece in pieces] == [0] * len(pieces)
    assert (pieces[0].type, pieces[0].function.name) == ("function", "get_time")  # type: ignore[union-attr]
    assert (pieces[0].id or "").startswith("call_")
    arguments = "".join(piece.function.arguments or "" for piece in pieces if piece.function)
    assert arguments == whole[0].function.arguments
    _check("get_time", arguments)
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert [c.choices[0].finish_reason for c in chunks][-1] == "tool_calls"


def test_a_result_is_read(client: OpenAI) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "celsius", "days": 1}'},
    }
    called: list[Any] = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}]
    result = {
        "role": "tool",
        "tool_call_id": "call_1",
        "content": "It rains, 12 degrees, and it will all week.",
    }
    num_prompt_tokens = []
    for messages in (called, [*called, result]):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=8
        )
        assert answer.choices[0].message.content
        assert answer.choices[0].message.tool_calls is None
        assert answer.usage is not None
        num_prompt_tokens.append(answer.usage.prompt_tokens)
    # This model is too small to make much of it, but it has read the result.
    assert num_prompt_tokens[1] - num_prompt_tokens[0] > 12


def test_schemas_that_cannot_be_kept_to(client: OpenAI) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[bad], tool_choice="required")  # type: ignore[list-item]
    assert caught.value.param == "tools"
    assert caught.value.code == "invalid_json_schema"
