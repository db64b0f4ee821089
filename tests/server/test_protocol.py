"""What the wire models, the table of known fields and their error messages make of bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.http_client import MODEL, api, chat
from tests.server.in_process_engine import ScriptedEngine, tokens

_BIG = 10**30

# (fields of a chat body, param, code)


def _call(**fields: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}} | fields


def _tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | fields}


BAD_CHAT_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "invalid_type"),
    ({"messages": []}, "messages", "array_below_min_length"),
    ({"messages": "Hi"}, "messages", "invalid_type"),
    ({"messages": [123]}, "messages[0]", "invalid_type"),
    ({"messages": [{}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
    (
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages[0].tool_call_id",
        "missing_required_parameter",
    ),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content", "missing_required_parameter"),
    (
        {"messages": [{"role": "assistant", "tool_calls": []}]},
        "messages[0].content",
        "missing_required_parameter",
    ),
    ({"messages": [{"role": "assistant", "content": 5}]}, "messages[0].content", "invalid_type"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [_call(type="x")]}]},
        "messages[0].tool_calls[0].type",
        "invalid_value",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [_call(id=5)]}]},
        "messages[0].tool_calls[0].id",
        "invalid_type",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [_call(function={"name": "f", "arguments": {}})]}]},
        "messages[0].tool_calls[0].function.arguments",
        "invalid_type",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "function_call": {}}]},
        "messages[0].function_call",
        "unsupported_parameter",
    ),
    ({"tools": {}}, "tools", "invalid_type"),
    ({"tools": [{}]}, "tools[0].type", "missing_required_parameter"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"tools": [_tool(name="a b")]}, "tools[0].function.name", "invalid_value"),
    ({"tools": [_tool(name="a\n")]}, "tools[0].function.name", "invalid_value"),
    ({"tools": [_tool(name="")]}, "tools[0].function.name", "invalid_value"),
    ({"tools": [_tool(name="a" * 65)]}, "tools[0].function.name", "string_above_max_length"),
    ({"tools": [_tool(parameters=[])]}, "tools[0].function.parameters", "invalid_type"),
    ({"tools": [_tool(), _tool()]}, "tools[1].function.name", "invalid_value"),
    ({"tools": [_tool()] * 10_000}, "tools", "array_above_max_length"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tool_choice": "any", "tools": [_tool()]}, "tool_choice", "invalid_value"),
    ({"tool_choice": 5, "tools": [_tool()]}, "tool_choice", "invalid_type"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [_tool()]},
        "tool_choice",
        "invalid_value",
    ),
    (
        {"tool_choice": {"type": "function"}, "tools": [_tool()]},
        "tool_choice.function",
        "missing_required_parameter",
    ),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls", "invalid_type"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", "invalid_type"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "invalid_value",
    ),
    ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "array_below_min_length"),
    ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content[0]", "invalid_type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}
            ]
        },
        "messages[0].content[0].type",
        "unsupported_content_type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "No."}]}]},
        "messages[0].content[0].type",
        "unsupported_content_type",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
        "unsupported_content_type",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]},
        "messages[0].content[0].refusal",
        "missing_required_parameter",
    ),
    ({"messages": [{"role": "assistant", "content": [1]}]}, "messages[0].content[0]", "invalid_type"),
    ({"messages": [{"role": "assistant", "refusal": 5}]}, "messages[0].refusal", "invalid_type"),
    ({"messages": [{"role": "user", "content": "x"}] * 20_000}, "messages", "array_above_max_length"),
    ({"model": 5}, "model", "invalid_type"),
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": -1}, "n", "integer_below_min_value"),
    ({"n": 10_000}, "n", "integer_above_max_value"),
    ({"n": 2**63}, "n", "integer_above_max_value"),
    ({"n": _BIG}, "n", "integer_above_max_value"),
    ({"n": "1"}, "n", "invalid_type"),
    ({"n": True}, "n", "invalid_type"),
    ({"n": 1.0}, "n", "invalid_type"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": 2**63}, "max_tokens", "integer_above_max_value"),
    ({"max_tokens": 2**31}, "max_tokens", "context_length_exceeded"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "integer_below_min_value"),
    ({"max_completion_tokens": 513}, "max_completion_tokens", "context_length_exceeded"),
    ({"temperature": 3}, "temperature", "decimal_above_max_value"),
    ({"temperature": 2.5}, "temperature", "decimal_above_max_value"),
    ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
    ({"temperature": -0.0}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"temperature": float("nan")}, "temperature", "invalid_value"),
    ({"temperature": float("inf")}, "temperature", "invalid_value"),
    ({"temperature": float("-inf")}, "temperature", "invalid_value"),
    ({"temperature": [1]}, "temperature", "invalid_type"),
    ({"top_p": 0}, "top_p", "decimal_below_min_value"),
    ({"top_p": 1.1}, "top_p", "decimal_above_max_value"),
    ({"top_k": -2}, "top_k", "integer_below_min_value"),
    ({"top_k": _BIG}, "top_k", "integer_above_max_value"),
    ({"min_p": 2}, "min_p", "decimal_above_max_value"),
    ({"presence_penalty": 1e308}, "presence_penalty", "decimal_above_max_value"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "decimal_below_min_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value"),
    ({"seed": 2**64}, "seed", "integer_above_max_value"),
    ({"seed": 0.5}, "seed", "invalid_type"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"49152": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"abc": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"9" * 500: 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"1": 1e9}}, "logit_bias.1", "decimal_above_max_value"),
    ({"logit_bias": {"1": float("nan")}}, "logit_bias.1", "invalid_value"),
    ({"logit_bias": {"\x1b[31m": "x"}}, "logit_bias", "invalid_type"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "array_above_max_length"),
    ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
    ({"stop": ""}, "stop", "string_below_min_length"),
    ({"stop": ["a", ""]}, "stop[1]", "string_below_min_length"),
    ({"stop": ["a"] * 17}, "stop", "array_above_max_length"),
    ({"stop": ["a"] * 10_000}, "stop", "array_above_max_length"),
    ({"stop": "a" * 2**20}, "stop", "string_above_max_length"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "integer_below_min_value"),
    ({"stop_token_ids": [5, 49152]}, "stop_token_ids[1]", "integer_above_max_value"),
    ({"min_tokens": -1}, "min_tokens", "integer_below_min_value"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "integer_above_max_value"),
    ({"logprobs": 1}, "logprobs", "invalid_type"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "integer_below_min_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
        "invalid_type",
    ),
    ({"cache_salt": ""}, "cache_salt", "string_below_min_length"),
    ({"cache_salt": 5}, "cache_salt", "invalid_type"),
    ({"priority": 2**40}, "priority", "integer_above_max_value"),
    ({"user": 5}, "user", "invalid_type"),
    ({"request_id": "a b"}, "request_id", "invalid_value"),
    ({"request_id": "a" * 129}, "request_id", "string_above_max_length"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "integer_below_min_value"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "integer_below_min_value"),
    ({"allowed_token_ids": [5, 49152]}, "allowed_token_ids[1]", "integer_above_max_value"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "array_below_min_length"),
    ({"bad_words": [""]}, "bad_words[0]", "string_below_min_length"),
    ({"bad_words": ["the", "antidisestablishment"]}, "bad_words[1]", "unsupported_parameter"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "integer_above_max_value"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
    ({"thinking_token_budget": 0}, "thinking_token_budget", "integer_below_min_value"),
    ({"thinking_token_budget": 5}, "thinking_token_budget", "unsupported_parameter"),
]

UNSUPPORTED_CHAT_FIELDS: list[tuple[str, Any, list[Any]]] = [
    ("functions", [{}], [None, []]),
    ("function_call", "auto", [None, "none"]),
    ("modalities", ["text", "audio"], [None, ["text"]]),
    ("audio", {}, [None]),
    ("web_search_options", {}, [None]),
    ("chat_template", "{{ 1 }}", [None]),
    ("chat_template_kwargs", {"tokenize": True}, [None, {}, {"enable_thinking": False}]),
    ("chat_template_kwargs", {"messages": []}, [None]),
    ("reasoning_effort", "high", [None]),
    ("prediction", {"type": "content"}, [None]),
    ("service_tier", "priority", [None, "auto", "default"]),
]


def _check_error(response: Any, param: str | None, code: str, status: int = 400) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert isinstance(error["message"], str)
    assert len(error["message"]) < 500
    assert error["message"].isascii()
    assert error["message"].isprintable()
    return error["message"]


def _named(rows: list[tuple[dict[str, Any], str, str]]) -> list[Any]:
    return [pytest.param(*row, id=f"{row[1]}-{index}") for index, row in enumerate(rows)]


@pytest.mark.parametrize(("fields", "param", "code"), _named(BAD_CHAT_FIELDS))
async def test_bad_chat_fields(tokenizer: Tokenizer, fields: dict[str, Any], param: str, code: str) -> None:
    engine = ScriptedEngine(tokens([1]))
    # Python's own encoder writes NaN and Infinity as JavaScript does.
    content = json.dumps(chat() | fields).encode()
    async with api(engine, tokenizer) as client:
        response = await client.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
    _check_error(response, param, code)
    assert engine.requests == []


async def test_numbers_that_json_can_only_write_as_too_large(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        for text in ("1e999", "-1e999", "NaN", "Infinity"):
            content = b'{"messages":[{"role":"user","content":"x"}],"top_p":%s}' % text.encode()
            response = await client.post(
                "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
            )
            assert text not in _check_error(response, "top_p", "invalid_value")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": None}, "prompt", "invalid_type"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": []}, "prompt", "array_below_min_length"),
        ({"prompt": [[]]}, "prompt[0]", "array_below_min_length"),
        ({"prompt": [True]}, "prompt[0]", "invalid_type"),
        ({"prompt": ["a", 5]}, "prompt[1]", "invalid_type"),
        ({"prompt": [5, "a"]}, "prompt[1]", "invalid_type"),
        ({"prompt": [-1]}, "prompt[0]", "integer_below_min_value"),
        ({"prompt": [5, 49152]}, "prompt[1]", "integer_above_max_value"),
        ({"prompt": [[5], [5, 2**31]]}, "prompt[1][1]", "integer_above_max_value"),
        ({"prompt": [[5], [5, 49152]]}, "prompt[1][1]", "integer_above_max_value"),
        ({"prompt": ["a"] * 1025}, "prompt", "array_above_max_length"),
        ({"prompt": ["a"] * 100, "n": 100}, "n", "integer_above_max_value"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "integer_above_max_value"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "invalid_type"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
        ({"prompt": "a", "echo": "yes"}, "echo", "invalid_type"),
    ],
)
async def test_bad_completion_fields(
    tokenizer: Tokenizer, fields: dict[str, Any], param: str, code: str
) -> None:
    engine = ScriptedEngine(tokens([1]))
    async with api(engine, tokenizer) as client:
        _check_error(await client.post("/v1/completions", json={"model": MODEL} | fields), param, code)
    assert engine.requests == []


@pytest.mark.parametrize(("name", "bad", "allowed"), UNSUPPORTED_CHAT_FIELDS)
async def test_known_fields_that_are_not_honoured(
    tokenizer: Tokenizer, name: str, bad: Any, allowed: list[Any]
) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        response = await client.post("/v1/chat/completions", json=chat(**{name: bad}))
        assert name in _check_error(response, name, "unsupported_parameter")
        for value in allowed:
            response = await client.post("/v1/chat/completions", json=chat(**{name: value}))
            assert response.status_code == 200, value


async def test_null_is_the_default_of_every_optional_field(tokenizer: Tokenizer) -> None:
    from server.protocol import ChatCompletionRequest

    nulls = {name: None for name in ChatCompletionRequest.model_fields if name != "messages"}
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        response = await client.post("/v1/chat/completions", json=chat() | nulls)
    assert response.status_code == 200, response.text


async def test_unknown_fields_are_ignored_and_counted_under_bounded_names(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        fields = {"frobnicate": 1, "\x1b[31m": 2, "Ä" * 1000: 3}
        response = await client.post("/v1/chat/completions", json=chat(**fields))
        assert response.status_code == 200
        page = (await client.get("/metrics")).text
        assert 'inflightd:request_unknown_fields_total{field="frobnicate"} 1.0' in page
        assert 'inflightd:request_unknown_fields_total{field="other"} 2.0' in page
        for start in range(0, 1000, 100):
            many = {f"field_{i}": 1 for i in range(start, start + 100)}
            assert (await client.post("/v1/chat/completions", json=chat(**many))).status_code == 200
        page = (await client.get("/metrics")).text
    assert page.count("request_unknown_fields_total{") <= 33


async def test_a_strict_server_refuses_unknown_fields(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokens([1]))
    async with api(engine, tokenizer, ServerConfig(strict_fields=True)) as client:
        part = {"type": "text", "text": "Hi", "colour": "red"}
        rows: list[tuple[str, dict[str, Any], str | None]] = [
            ("/v1/chat/completions", chat(frobnicate=1), "frobnicate"),
            ("/v1/chat/completions", chat([part]), "messages[0].content[0].colour"),
            ("/v1/chat/completions", chat(**{"\x1b[31m" * 1000: 1}), None),
            ("/v1/completions", {"prompt": "a", "frobnicate": None}, "frobnicate"),
            ("/v1/responses", {"input": "a", "frobnicate": 1}, "frobnicate"),
            ("/v1/embeddings", {"input": "a", "frobnicate": 1}, "frobnicate"),
        ]
        for path, body, param in rows:
            _check_error(await client.post(path, json=body), param, "unknown_parameter")
        assert engine.requests == []
        known = chat(metadata={"a": "b"}, store=False, user="me", prompt_cache_key="x", top_k=3)
        assert (await client.post("/v1/chat/completions", json=known)).status_code == 200


async def test_fields_that_are_known_and_change_nothing_are_not_counted(tokenizer: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        body = chat(
            metadata={"a": "b"}, store=True, user="me", parallel_tool_calls=True, prompt_cache_key="x"
        )
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        assert "request_unknown_fields_total{" not in (await client.get("/metrics")).text


@pytest.mark.parametrize(
    "name", ["gpt-5", "../../etc/passwd", "/etc/passwd", "http://x/", "", "a\x00b", "é", "x" * 1_000_000]
)
async def test_unknown_models(tokenizer: Tokenizer, name: str) -> None:
    async with api(ScriptedEngine(tokens([1])), tokenizer) as client:
        response = await client.post("/v1/chat/completions", json=chat(model=name))
        _check_error(response, "model", "model_not_found", 404)
