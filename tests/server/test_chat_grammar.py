"""Which grammar a chat gets, checked by the real check."""

from __future__ import annotations

import functools
from typing import Any

import llguidance
import pytest

from server.chat_template import ChatTemplate
from server.tokenizer import Tokenizer
from tests.server.http_client import api, chat
from tests.server.in_process_engine import ScriptedEngine, tokens
from tests.server.text_fixtures import TEMPLATES

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture
def thinking(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    template = ChatTemplate((TEMPLATES / "thinking.jinja").read_text())
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return tokenizer


async def _grammar(tokenizer: Tokenizer, **fields: Any) -> str | None:
    engine = ScriptedEngine(tokens([5]))
    async with api(engine, tokenizer) as client:
        response = await client.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == 200, response.text
    return engine.requests[0].grammar


@functools.cache
def _tokens(tokenizer: str) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(tokenizer, eos_token=[0])


def _takes(tokenizer: Tokenizer, grammar: str | None, text: str) -> bool:
    assert grammar is not None
    matcher = llguidance.LLMatcher(_tokens(tokenizer.vocabulary.tokenizer), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.consume_tokens(tokenizer.encode(text)) and matcher.is_accepting())


async def test_free_answers_have_none(thinking: Tokenizer) -> None:
    assert await _grammar(thinking) is None
    assert await _grammar(thinking, tools=[NOW]) is None


async def test_a_format_holds_behind_the_reasoning(thinking: Tokenizer) -> None:
    grammar = await _grammar(thinking, response_format=FORMAT)
    for text in ('{"a": 1}', '<think>\nHm.\n</think>\n\n{"a": 1}'):
        assert _takes(thinking, grammar, text), text
    for text in ("", "Hm.", '{"a": "b"}', "<think>Hm.</think>Yes", CALL):
        assert not _takes(thinking, grammar, text), text


async def test_a_call_may_come_instead_of_the_format(thinking: Tokenizer) -> None:
    grammar = await _grammar(thinking, response_format=FORMAT, tools=[NOW])
    for text in ('{"a": 1}', CALL, f"<think>Hm.</think>\n{CALL}"):
        assert _takes(thinking, grammar, text), text
    assert not _takes(thinking, grammar, "Yes")
    grammar = await _grammar(thinking, response_format=FORMAT, tools=[NOW], tool_choice="required")
    assert _takes(thinking, grammar, CALL)
    assert not _takes(thinking, grammar, '{"a": 1}')


async def test_other_grammars_hold_behind_the_reasoning_too(thinking: Tokenizer) -> None:
    grammar = await _grammar(thinking, guided_choice=["yes", "no"])
    assert _takes(thinking, grammar, "<think>Hm.</think>\nno")
    assert not _takes(thinking, grammar, "<think>Hm.</think>\nmaybe")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
async def test_schemas_that_nobody_can_keep_to(thinking: Tokenizer, choice: Any) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "no such type"}}}
    async with api(ScriptedEngine(tokens([5])), thinking) as client:
        body = chat(tools=[bad], tool_choice=choice)
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("tools", "invalid_json_schema")


async def test_a_budget_needs_a_token_that_ends_the_reasoning(thinking: Tokenizer) -> None:
    async with api(ScriptedEngine(tokens([5])), thinking) as client:
        response = await client.post("/v1/chat/completions", json=chat(thinking_token_budget=5))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "thinking_token_budget"
        # One of this model's control tokens plays the part.
        thinking.added_token_ids["</think>"] = 3
        try:
            response = await client.post("/v1/chat/completions", json=chat(thinking_token_budget=5))
        finally:
            del thinking.added_token_ids["</think>"]
        assert response.status_code == 200


@pytest.fixture
def bounded(thinking: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """One of this model's control tokens plays the end of the reasoning."""
    monkeypatch.setitem(thinking.added_token_ids, "</think>", 3)
    return thinking


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (
            "/v1/messages",
            {
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": 50,
                "thinking": {"type": "enabled", "budget_tokens": 5},
            },
        ),
        ("/v1/responses", {"input": "Hi", "thinking_token_budget": 5}),
        ("/v1/chat/completions", chat(thinking_token_budget=5)),
    ],
)
async def test_every_chat_api_has_a_budget(bounded: Tokenizer, path: str, fields: dict[str, Any]) -> None:
    engine = ScriptedEngine(tokens([5]))
    async with api(engine, bounded) as client:
        response = await client.post(path, json=fields)
    assert response.status_code == 200, response.text
    assert "[max_tokens=5]" in (engine.requests[0].grammar or "")


@pytest.mark.parametrize("switch", [{"type": "disabled", "budget_tokens": 5}, {"type": "adaptive"}])
async def test_messages_without_a_budget(bounded: Tokenizer, switch: dict[str, Any]) -> None:
    engine = ScriptedEngine(tokens([5]))
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50, "thinking": switch}
    async with api(engine, bounded) as client:
        assert (await client.post("/v1/messages", json=body)).status_code == 200
    assert engine.requests[0].grammar is None


async def test_a_budget_for_a_model_that_does_not_think(tokenizer: Tokenizer) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}
    body["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    async with api(ScriptedEngine(tokens([5])), tokenizer) as client:
        assert (await client.post("/v1/messages", json=body)).status_code == 200
        refused = await client.post("/v1/responses", json={"input": "Hi", "thinking_token_budget": 5})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "thinking_token_budget"
