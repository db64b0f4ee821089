"""From the fields of a request to a checked grammar, and what is said about those that are wrong."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from server.errors import InvalidRequestError
from server.grammar_check import TOO_COMPLEX, GrammarCheck
from server.grammars import MAX_GRAMMAR_BYTES, from_json_schema, from_regex
from server.structured_output import StructuredOutput, grammar_constraint, json_constraint
from server.tokenizer import Tokenizer
from tests.server.http_client import api, chat
from tests.server.in_process_engine import ScriptedEngine, tokens

JSON = {"content-type": "application/json"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<tool_call>f(", "schema": SCHEMA, "end": ")"}],
    "triggers": ["<tool_call>"],
}
# Fields, and what the grammar that they become must contain.
GOOD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, '"type":"object"'),
    ({"response_format": {"type": "json_object", "value": SCHEMA}}, '"integer"'),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, '"integer"'),
    ({"response_format": {"type": "json", "value": json.dumps(SCHEMA)}}, '"integer"'),
    ({"response_format": {"type": "regex", "value": r"\d+"}}, "[0-9]"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        '"lenient":true',
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True}}},
        '"lenient":false',
    ),
    ({"response_format": TAG}, '"f(" %json'),
    ({"guided_json": SCHEMA}, '"integer"'),
    ({"guided_json": json.dumps(SCHEMA)}, '"integer"'),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": "[ ]?"}, "[ ]?"),
    ({"guided_regex": r"\d+"}, "[0-9]"),
    ({"guided_choice": ["yes", "no"]}, "yes|no"),
    ({"guided_grammar": 'root ::= "a"'}, 'start: "a"'),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, '"whitespace_flexible":false'),
    ({"structured_outputs": {"regex": "a+"}}, "a+"),
    ({"structured_outputs": {"choice": ["x"]}}, "x"),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, "start"),
    ({"structured_outputs": {"json_object": True}}, '"type":"object"'),
    ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, '"f(" %json'),
    # Bounds that cost nothing, since they are only counted up to.
    ({"guided_json": {"type": "array", "maxItems": 10**9}}, "maxItems"),
    ({"guided_json": {"type": "string", "maxLength": 10**6}}, "maxLength"),
    ({"guided_json": {"anyOf": [{"type": "null"}, {"type": "array", "minItems": 10**9}]}}, "minItems"),
    ({"guided_regex": "[ab]{0,1000000}"}, "{0,1000000}"),
    ({"guided_grammar": 'start: x{0,1000000000}\nx: "a" | "b"'}, "1000000000"),
]
FREE: list[dict[str, Any]] = [
    {},
    {"response_format": None},
    {"response_format": {"type": "text"}},
    {"structured_outputs": {}},
    {"guided_decoding_backend": "guidance"},
]
_DEEP: dict[str, Any] = {"type": "string"}
for _ in range(70):
    _DEEP = {"type": "object", "properties": {"a": _DEEP}}
# Fields, the parameter to blame, the code, and a part of the message.
BAD: list[tuple[dict[str, Any], str, str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format", "invalid_type", "json_schema"),
    ({"response_format": {"type": "regex"}}, "response_format.value", "missing_required_parameter", ""),
    (
        {"response_format": {"type": "json_object", "value": {"type": "no such type"}}},
        "response_format.value",
        "invalid_json_schema",
        "",
    ),
    (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "missing_required_parameter",
        "",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "strin"}},
            }
        },
        "response_format.json_schema.schema",
        "invalid_json_schema",
        "Invalid type: strin",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "n",
                    "strict": True,
                    "schema": {"type": "string", "format": "colour"},
                },
            }
        },
        "response_format.json_schema.schema",
        "invalid_json_schema",
        "colour",
    ),
    ({"guided_json": "{"}, "guided_json", "invalid_json_schema", "no valid JSON"),
    ({"guided_json": "[" * 100_000}, "guided_json", "invalid_json_schema", "no valid JSON"),
    ({"guided_json": 5}, "guided_json", "invalid_type", "JSON schema"),
    ({"guided_json": {"$ref": "#"}}, "guided_json", "invalid_json_schema", "no text satisfies it"),
    ({"guided_json": {"$ref": "http://127.0.0.1/x"}}, "guided_json", "invalid_json_schema", "Resource"),
    ({"guided_json": {"enum": []}}, "guided_json", "invalid_json_schema", "nsatisfiable"),
    (
        {"guided_json": {"type": "integer", "minimum": 3, "maximum": 2}},
        "guided_json",
        "invalid_json_schema",
        "3",
    ),
    ({"guided_json": _DEEP}, "guided_json", "invalid_json_schema", "nested too deeply"),
    ({"guided_json": {"const": "x" * MAX_GRAMMAR_BYTES}}, "guided_json", "invalid_json_schema", "bytes"),
    (
        {"guided_json": {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}b"} for n in range(10, 30)]}},
        "guided_json",
        "grammar_too_complex",
        "0.7 s",
    ),
    # More than any answer has.
    (
        {"guided_json": {"type": "array", "minItems": 10**9}},
        "guided_json",
        "invalid_json_schema",
        "'minItems' takes more than",
    ),
    (
        {
            "guided_json": {
                "type": "object",
                "properties": {"a": {"type": "string", "minLength": 10**9}},
                "required": ["a"],
            }
        },
        "guided_json",
        "invalid_json_schema",
        "'minLength' at '/properties/a'",
    ),
    (
        {"guided_json": {"type": "object", "minProperties": 1e9}},
        "guided_json",
        "invalid_json_schema",
        "minPro",
    ),
    ({"guided_regex": "[ab]{1000000}"}, "guided_regex", "invalid_regex", "more than"),
    (  # a list of nothing but forced tokens
        {"structured_outputs": {"grammar": 'start: "a"~1000000000'}},
        "structured_outputs.grammar",
        "invalid_grammar",
        "Too many items",
    ),
    ({"guided_regex": "(a"}, "guided_regex", "invalid_regex", "regex"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "invalid_regex", "regex"),
    ({"guided_regex": "(.{1,9999}){9999}"}, "guided_regex", "invalid_regex", ""),
    ({"guided_regex": "(" * 100_000}, "guided_regex", "invalid_regex", ""),
    ({"guided_json": '{"const": "\\ud800"}'}, "guided_json", "invalid_json_schema", "hex escape"),
    ({"guided_choice": []}, "guided_choice", "array_below_min_length", ""),
    ({"guided_choice": [1]}, "guided_choice[0]", "invalid_type", ""),
    ({"guided_grammar": "start: nobody"}, "guided_grammar", "invalid_grammar", "nobody"),
    ({"guided_grammar": 'root ::= "a'}, "guided_grammar", "invalid_grammar", ""),
    ({"guided_grammar": "start: start"}, "guided_grammar", "invalid_grammar", "no text satisfies it"),
    (  # overflows llguidance's stack
        {
            "guided_grammar": "start: r0\n"
            + "".join(f'r{n}: "a" r{n + 1} | "b"\n' for n in range(3000))
            + 'r3000: "z"'
        },
        "guided_grammar",
        "grammar_too_complex",
        "",
    ),
    (
        {"structured_outputs": {"structural_tag": "{}"}},
        "structured_outputs.structural_tag",
        "invalid_value",
        "type",
    ),
    (
        {"response_format": {**TAG, "triggers": ["<other>"]}},
        "response_format",
        "invalid_structural_tag",
        "none of the triggers",
    ),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "invalid_value", "guided_regex"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs.regex",
        "invalid_value",
        "response_format",
    ),
    (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs.choice",
        "invalid_value",
        "",
    ),
]


@asynccontextmanager
async def service(tokenizer: Tokenizer) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedEngine]]:
    engine = ScriptedEngine(tokens([1]))
    async with api(engine, tokenizer) as client:
        yield client, engine


async def test_fields_become_grammars(tokenizer: Tokenizer) -> None:
    async with service(tokenizer) as (client, engine):
        for fields, part in GOOD:
            for path, body in (("chat/completions", chat()), ("completions", {"prompt": "Hi"})):
                answer = await client.post(f"/v1/{path}", json={**body, **fields})
                assert answer.status_code == 200, answer.text
                assert part in (engine.requests[-1].grammar or "").replace('\\"', '"'), fields
        for fields in FREE:
            assert (await client.post("/v1/chat/completions", json=chat(**fields))).status_code == 200
            assert engine.requests[-1].grammar is None
        answer = await client.post("/v1/chat/completions", json=chat(n=3, guided_regex="a"))
        assert answer.status_code == 200
        assert len({request.grammar for request in engine.requests[-3:]}) == 1
        metrics = (await client.get("/metrics")).text
        assert 'grammar_refusals_total{engine="0",model_name="smollm2-135m-instruct"} 0.0' in metrics


async def test_wrong_and_hostile_grammars_are_400_within_a_second(tokenizer: Tokenizer) -> None:
    async with service(tokenizer) as (client, engine):
        await client.post("/v1/chat/completions", json=chat(guided_regex="a"))  # starts the process
        for fields, param, code, part in BAD:
            began = time.monotonic()
            answer = await client.post(
                "/v1/chat/completions", content=json.dumps(chat(**fields)), headers=JSON
            )
            seconds = time.monotonic() - began
            error = answer.json()["error"]
            assert answer.status_code == 400, fields
            assert (error["param"], error["code"]) == (param, code), error
            assert error["type"] == "invalid_request_error"
            assert part in error["message"], error["message"]
            assert len(error["message"]) < 450
            assert seconds < 2.0, (seconds, param)  # 0.7 s and a new process, on a machine that is not ours
        assert len(engine.requests) == 1
        # After all that, the next one is answered as ever.
        answer = await client.post("/v1/chat/completions", json=chat(guided_regex="b"))
        assert answer.status_code == 200


async def test_tgi_grammars(tokenizer: Tokenizer) -> None:
    async with service(tokenizer) as (client, engine):
        for grammar, part in (
            ({"type": "json", "value": SCHEMA}, '"integer"'),
            ({"type": "json", "value": json.dumps(SCHEMA)}, '"integer"'),
            ({"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}}, '"integer"'),
            ({"type": "regex", "value": "[ab]+"}, "[ab]+"),
        ):
            body = {"inputs": "Hi", "parameters": {"grammar": grammar}}
            answer = await client.post("/generate", json=body)
            assert answer.status_code == 200, answer.text
            assert part in (engine.requests[-1].grammar or "")
        for grammar in (
            {"type": "regex", "value": "("},
            {"type": "regex", "value": 1},
            {"type": "json", "value": []},
        ):
            body = {"inputs": "Hi", "parameters": {"grammar": grammar}}
            answer = await client.post("/generate", json=body)
            assert answer.status_code == 422
            assert "parameters.grammar.value" in answer.json()["error"]


async def test_a_hostile_grammar_stops_neither_the_event_loop_nor_other_grammars(
    tokenizer: Tokenizer,
) -> None:
    check = GrammarCheck(tokenizer, lambda: 1000)
    assert await check.error_in(from_regex("a")) is None
    hostile = from_json_schema(
        {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}b"} for n in range(10, 30)]}
    )
    work = asyncio.create_task(check.error_in(hostile))
    longest = 0.0
    while not work.done():
        began = time.monotonic()
        await asyncio.sleep(0.005)
        longest = max(longest, time.monotonic() - began)
    assert await work == TOO_COMPLEX
    assert longest < 0.3
    began = time.monotonic()
    assert await check.error_in(hostile) == TOO_COMPLEX  # remembered
    assert time.monotonic() - began < 0.05
    assert await check.error_in(from_regex("b")) is None
    assert (check.num_compiled, check.num_refused) == (3, 1)
    check.close()


async def test_what_other_parts_of_the_server_ask_for(tokenizer: Tokenizer) -> None:
    structured_output = StructuredOutput(GrammarCheck(tokenizer, lambda: 1000), tokenizer.special_token_names)
    grammar = await structured_output.checked(grammar_constraint('start: <|im_start|> "a"', "tools"))
    assert "im_start" in grammar
    await structured_output.checked(json_constraint(SCHEMA, "tools[0].function.parameters"))
    with pytest.raises(InvalidRequestError) as caught:
        await structured_output.checked(json_constraint({"type": "nothing"}, "tools[0].function.parameters"))
    assert caught.value.param == "tools[0].function.parameters"
    structured_output._check.close()


async def test_verdicts_are_not_all_remembered(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.grammar_check._MAX_VERDICTS", 10)
    check = GrammarCheck(tokenizer, lambda: 1000)
    asked: list[str] = []

    def ask(grammar: str, max_tokens: int) -> str:
        asked.append(grammar)
        return ""

    monkeypatch.setattr(check, "_ask", ask)
    for index in range(100):
        assert await check.error_in(f'{{"grammars":[{index}]}}') is None
    assert len(check._verdicts) == 10
    for index in (99, 90, 99):  # remembered
        await check.error_in(f'{{"grammars":[{index}]}}')
    assert len(asked) == 100
    await check.error_in('{"grammars":[89]}')
    assert len(asked) == 101
    check.close()
