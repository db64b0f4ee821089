"""``/v1/responses`` by the official OpenAI client against a real server process."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import openai
import pydantic
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.end_to_end.server_process import ServerProcess

MODEL = "smollm2-135m-instruct"
QUESTION = "Name the capital of France."


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_create_retrieve_and_delete(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=30
    )
    response = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=30)
    assert "Paris" in response.output_text
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert client.responses.retrieve(response.id).output_text == response.output_text
    more = client.responses.create(
        model=MODEL,
        input="And of Italy?",
        previous_response_id=response.id,
        temperature=0,
        max_output_tokens=20,
    )
    assert more.usage is not None
    assert more.usage.input_tokens > response.usage.total_tokens
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_stream(client: OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=30) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        response = stream.get_final_response()
    assert "".join(pieces) == response.output_text
    assert response.status == "completed"
    assert client.responses.retrieve(response.id).output_text == response.output_text


class City(pydantic.BaseModel):
    name: str
    country: Literal["France", "Italy"]


def test_a_form_for_the_text(client: OpenAI) -> None:
    question = "The capital of France, as JSON."
    parsed = client.responses.parse(
        model=MODEL, input=question, text_format=City, temperature=0, max_output_tokens=60
    )
    assert parsed.output_parsed is not None
    assert parsed.output_parsed.country in ("France", "Italy")
    assert parsed.text is not None
    assert parsed.text.format is not None
    assert parsed.text.format.type == "json_schema"
    with client.responses.stream(
        model=MODEL, input=question, text_format=City, temperature=0, max_output_tokens=60
    ) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed


def test_a_function_is_called(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "name": "get_weather", "parameters": schema, "strict": True}
    response = client.responses.create(
        model=MODEL,
        input="What is the weather in Rome?",
        tools=[tool],
        tool_choice="required",
        temperature=0,
        max_output_tokens=60,
    )
    call = response.output[0]
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    follow = client.responses.create(
        model=MODEL,
        previous_response_id=response.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}],
        temperature=0,
        max_output_tokens=20,
    )
    assert follow.output_text


async def test_async_stream(server: ServerProcess) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        events = [
            event
            async for event in await client.responses.create(
                model=MODEL, input=QUESTION, temperature=0, max_output_tokens=5, stream=True, store=False
            )
        ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.store is False  # type: ignore[attr-defined]


def test_they_are_in_the_database(client: OpenAI, responses_db: Path) -> None:
    made = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=5)
    with contextlib.closing(sqlite3.connect(f"file:{responses_db}?mode=ro", uri=True)) as database:
        [body] = database.execute("SELECT body FROM responses WHERE id = ?", (made.id,)).fetchone()
    assert json.loads(body)["output"][0]["content"][0]["text"] == made.output_text
