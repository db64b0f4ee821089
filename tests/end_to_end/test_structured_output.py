"""Answers that must follow a grammar, from the real server and the default model, at temperature 1."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from tests.end_to_end.server_process import ServerProcess

MODEL = "smollm2-135m-instruct"
MESSAGES: list[Any] = [{"role": "user", "content": "Invent a person. Answer as JSON."}]


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Pet(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=12)]
    legs: Annotated[int, Field(ge=0, le=8)]


class Person(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=120)]
    height: Annotated[float, Field(ge=0, le=3)]
    colours: Annotated[list[Colour], Field(max_length=3)]
    pet: Pet | None


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_parsed_answers(client: OpenAI) -> None:
    for seed in range(5):
        answer = client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, response_format=Person, temperature=1, seed=seed, max_tokens=400
        )
        choice = answer.choices[0]
        assert isinstance(choice.message.parsed, Person)
        assert choice.finish_reason == "stop"


def test_a_strict_schema_streams(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=Person, temperature=1, seed=7, max_tokens=400
    ) as stream:
        for _ in stream:
            pass
        answer = stream.get_final_completion()
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_several_choices_with_logprobs(client: OpenAI, server: ServerProcess) -> None:
    def ask(**fields: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "pet", "schema": Pet.model_json_schema(), "strict": True},
            },
            temperature=1,
            seed=3,
            n=3,
            max_tokens=100,
            **fields,
        )

    answer = ask(logprobs=True, top_logprobs=2)
    for choice in answer.choices:
        Pet.model_validate_json(choice.message.content)
        text = "".join(token.token for token in choice.logprobs.content[:-1])  # the last is the end
        assert text == choice.message.content
        assert all(token.logprob <= 0 for token in choice.logprobs.content)
    assert len({choice.message.content for choice in answer.choices}) > 1
    again = [c.message.content for c in ask(logprobs=True).choices]
    assert again == [c.message.content for c in answer.choices] or not server.is_exact


def test_json_objects(client: OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            response_format={"type": "json_object"},
            temperature=1,
            seed=seed,
            max_tokens=12,
        )
        choice = answer.choices[0]
        text = choice.message.content or ""
        assert text.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": r"\d{3}-\d{4}"}, r"\d{3}-\d{4}"),
        ({"guided_choice": ["yes", "no", "perhaps"]}, "yes|no|perhaps"),
        ({"guided_grammar": 'root ::= "<" [a-f]{2,5} ">"'}, "<[a-f]{2,5}>"),
        ({"structured_outputs": {"regex": "[A-Z][a-z]{1,9}"}}, "[A-Z][a-z]{1,9}"),
    ],
)
def test_vllms_fields(client: OpenAI, fields: dict[str, Any], pattern: str) -> None:
    for seed in range(3):
        chat = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=1, seed=seed, max_tokens=40, extra_body=fields
        )
        text = client.completions.create(
            model=MODEL, prompt="It is", temperature=1, seed=seed, max_tokens=40, extra_body=fields
        )
        assert re.fullmatch(pattern, chat.choices[0].message.content or "")
        assert re.fullmatch(pattern, text.choices[0].text)
        assert chat.choices[0].finish_reason == text.choices[0].finish_reason == "stop"


def test_a_structural_tag(client: OpenAI) -> None:
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": "<f>", "schema": {"enum": [1, 2]}, "end": "</f>"}],
        "triggers": ["<f>"],
    }
    answer = client.completions.create(
        model=MODEL,
        prompt="<f>1</f><f>2</f><f>1</f>",
        temperature=1,
        seed=2,
        max_tokens=60,
        extra_body={"response_format": tag},
    )
    parts = answer.choices[0].text.split("<f>")
    for part in parts[1:-1] if answer.choices[0].finish_reason == "length" else parts[1:]:
        assert re.match(r"[12]</f>", part)


def test_how_it_ends(client: OpenAI) -> None:
    def ask(**fields: Any) -> Any:
        extra = {"guided_regex": "[ab]{6}", **fields.pop("extra", {})}
        fields = {"max_tokens": 50, **fields}
        return client.completions.create(
            model=MODEL, prompt="a b a b", temperature=1, seed=1, extra_body=extra, **fields
        ).choices[0]

    whole = ask()
    assert (len(whole.text), whole.finish_reason) == (6, "stop")
    assert ask(extra={"ignore_eos": True}).text == whole.text
    assert ask(extra={"min_tokens": 40}).text == whole.text
    cut = ask(max_tokens=2)
    assert cut.finish_reason == "length"
    assert len(cut.text) < 6
    stopped = ask(stop=[whole.text[2:4]])
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(whole.text[2:4])]


def test_tgi_grammar(server: ServerProcess) -> None:
    body = {
        "inputs": "A number:",
        "parameters": {
            "grammar": {"type": "json", "value": {"enum": [10, 20]}},
            "seed": 1,
            "do_sample": True,
        },
    }
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=30)
    assert TypeAdapter(int).validate_json(answer.json()["generated_text"]) in (10, 20)


def test_wrong_schemas_name_the_field(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "colour"}, "strict": True},
            },
        )
    assert caught.value.param == "response_format.json_schema.schema"
    assert caught.value.code == "invalid_json_schema"


async def test_constrained_streams_beside_free_and_hostile_ones(server: ServerProcess) -> None:
    """Free greedy streams are token-identical to a quiet run; each constrained one is valid."""
    hostile = {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}b"} for n in range(10, 31)]}
    question: list[Any] = [{"role": "user", "content": "Name the capital of France."}]
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def free() -> str:
            stream = await client.chat.completions.create(
                model=MODEL, messages=question, temperature=0, max_tokens=30, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def constrained(seed: int) -> Person:
            answer = await client.chat.completions.parse(
                model=MODEL,
                messages=MESSAGES,
                response_format=Person,
                temperature=1,
                seed=seed,
                max_tokens=400,
            )
            assert answer.choices[0].message.parsed is not None
            return answer.choices[0].message.parsed

        async def refused() -> float:
            began = time.monotonic()
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(
                    model=MODEL, messages=question, extra_body={"guided_json": hostile}
                )
            assert caught.value.code == "grammar_too_complex"
            return time.monotonic() - began

        quiet = await free()
        alone = await constrained(3)
        results = await asyncio.gather(
            refused(), *(free() for _ in range(4)), *(constrained(seed) for seed in range(6))
        )
    if server.is_exact:
        assert results[1:5] == [quiet] * 4
        assert results[8] == alone
    assert results[0] < 3.0
    server.wait_until("num_requests_running", 0)
    server.wait_until("kv_cache_usage_perc", 0)
