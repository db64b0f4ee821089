"""Anthropic's client against a real server process with the real default model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from tests.end_to_end.server_process import ServerProcess

MODEL = "smollm2-135m-instruct"
# The client has no parameters for sampling any more.
GREEDY = {"temperature": 0}
QUESTION = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_messages(client: Anthropic) -> None:
    whole = client.messages.create(model=MODEL, max_tokens=30, extra_body=GREEDY, messages=QUESTION)
    [block] = whole.content
    assert "Paris" in block.text
    assert whole.stop_reason == "end_turn"
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens
    assert whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0) == counted
    with client.messages.stream(model=MODEL, max_tokens=30, extra_body=GREEDY, messages=QUESTION) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == message.content[0].text == block.text
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == whole.usage.output_tokens


def test_a_stop_sequence_and_an_error(client: Anthropic) -> None:
    cut = client.messages.create(
        model=MODEL, max_tokens=30, extra_body=GREEDY, messages=QUESTION, stop_sequences=["Paris"]
    )
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", "Paris")
    assert "Par" not in cut.content[0].text
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model=MODEL, max_tokens=10_000, messages=QUESTION)


def test_a_form_for_the_text(client: Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"country": {"enum": ["France", "Italy"]}},
        "required": ["country"],
        "additionalProperties": False,
    }
    message = client.messages.create(
        model=MODEL,
        max_tokens=40,
        messages=QUESTION,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert json.loads(message.content[0].text)["country"] in ("France", "Italy")


def test_a_tool_is_called_and_its_result_read(client: Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    ask = {
        "model": MODEL,
        "max_tokens": 60,
        "tools": [{"name": "get_weather", "description": "Weather of a city.", "input_schema": schema}],
        "extra_body": GREEDY,
    }
    messages = [{"role": "user", "content": "What is the weather in Rome?"}]
    with client.messages.stream(**ask, messages=messages, tool_choice={"type": "any"}) as stream:
        message = stream.get_final_message()
    [call] = message.content
    assert message.stop_reason == "tool_use"
    assert call.type == "tool_use"
    assert call.name == "get_weather"
    assert call.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 25 degrees."}
    messages += [
        {"role": "assistant", "content": [call.model_dump(exclude_none=True)]},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(**ask, messages=messages, tool_choice={"type": "none"})
    assert [block.type for block in answer.content] == ["text"]


async def test_async_streams_run_together(server: ServerProcess) -> None:
    async with AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:

        async def ask(number: int) -> str:
            async with client.messages.stream(
                model=MODEL,
                max_tokens=16,
                extra_body=GREEDY,
                system="You count.",
                messages=[{"role": "user", "content": f"Count to {number}."}],
            ) as stream:
                return "".join([piece async for piece in stream.text_stream])

        together = await asyncio.gather(*(ask(number) for number in range(3, 9)))
        assert together[2] == await ask(5)
