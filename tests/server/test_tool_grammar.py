"""Grammars of tools, followed by llguidance over the default model's tokens and made-up control tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import llguidance
import pytest
import tokenizers

from server.parsing.call_writing import ArgumentWriting
from server.parsing.deltas import collected
from server.parsing.formats import (
    DEEPSEEK,
    DEEPSEEK_BLOCKS,
    GLM45,
    HARMONY,
    HARMONY_REASONING,
    HERMES,
    JSON,
    LLAMA3_JSON,
    MINIMAX_M2,
    MISTRAL,
    MISTRAL_NAMED,
    PYTHONIC,
    PYTHONIC_MARKED,
    QWEN3_CODER,
    THINK,
    ToolFormat,
)
from server.parsing.output_parser import OutputParser, OutputSyntax
from server.tokenizer import Tokenizer
from server.tool_choice import ToolChoice
from server.tool_grammar import tool_grammar

ALL = [
    HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED, PYTHONIC, PYTHONIC_MARKED, DEEPSEEK, DEEPSEEK_BLOCKS, JSON,
    HARMONY, QWEN3_CODER, GLM45, MINIMAX_M2,
]  # fmt: skip
FORMATS = pytest.mark.parametrize("tools", ALL, ids=lambda each: f"{each.name}-{ALL.index(each)}")
CONTROL = frozenset(
    (
        *MISTRAL.markers,
        *DEEPSEEK.markers,
        *HARMONY.markers,
        *PYTHONIC.markers,
        *THINK.markers,
        *GLM45.others,
    )
)


def _tool(name: str, properties: Mapping[str, Any], required: list[str], **fields: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


WEATHER = _tool(
    "get_weather",
    {"city": {"type": "string"}, "days": {"type": "integer"}, "ok": {"type": "boolean"}},
    ["city"],
)
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
STRICT = _tool("get_weather", {"city": {"enum": ["Rome"]}}, ["city"], strict=True)


class Follower:
    """Says which texts a grammar takes."""

    def __init__(self, backend: tokenizers.Tokenizer, eos: tuple[int, ...]) -> None:
        self.backend = backend
        self._tokenizer = llguidance.LLTokenizer(backend.to_str(), eos_token=list(eos))

    @property
    def tokens(self) -> dict[str, int]:
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items()}

    def takes(self, lark: str | None, text: str) -> bool:
        """Whether the whole text is one that the grammar describes."""
        assert lark is not None
        matcher = llguidance.LLMatcher(
            self._tokenizer, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0
        )
        assert not matcher.is_error(), (lark, matcher.get_error())
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return bool(matcher.consume_tokens(ids) and matcher.is_accepting())


@pytest.fixture(scope="module")
def follower(tokenizer: Tokenizer) -> Follower:
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in sorted(CONTROL)])
    return Follower(backend, tokenizer.eos_token_ids)


def _grammar(follower: Follower, choice: ToolChoice, syntax: OutputSyntax, budget: int | None = None) -> str:
    tokens = {name: i for name, i in follower.tokens.items() if name in syntax.markers}
    grammar = tool_grammar(choice, syntax, tokens, budget)
    assert grammar is not None
    return grammar


def _written(tools: ToolFormat, *calls: tuple[str, str]) -> str:
    if tools.writing.has_keywords:
        values = [(name, json.loads(arguments)) for name, arguments in calls]
        calls = tuple(
            (name, ", ".join(f"{key}={json.dumps(value)}" for key, value in given.items()))
            for name, given in values
        )
    if (tags := tools.writing.argument) is not None:
        calls = tuple((name, _in_tags(tags, json.loads(arguments))) for name, arguments in calls)
    return tools.writing.written(calls)


def _in_tags(tags: ArgumentWriting, given: Mapping[str, Any]) -> str:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    return "".join(
        f"{tags.before_name}{name}{tags.before_value}{text}{tags.after_value}" for name, text in texts.items()
    )


PARIS = ("get_weather", '{"city": "Paris"}')
PARIS_DAYS = ("get_weather", '{"city": "Paris", "days": 3, "ok": true}')
NOW_CALL = ("now", "{}")


@FORMATS
def test_what_is_required_is_written_and_read(follower: Follower, tools: ToolFormat) -> None:
    syntax = OutputSyntax(tools, tool_names=frozenset({"get_weather", "now"}))
    grammar = _grammar(follower, ToolChoice((WEATHER, NOW), is_required=True), syntax)
    for calls in ([PARIS], [PARIS_DAYS], [NOW_CALL], [PARIS, NOW_CALL, PARIS_DAYS]):
        if len(calls) > 1 and tools.writing.between is None:
            continue
        text = _written(tools, *calls)
        assert follower.takes(grammar, text), text
        parser = OutputParser(syntax)
        parsed = collected([*parser.push(text), *parser.finish()])
        assert [(each.name, json.loads(each.arguments)) for each in parsed.tool_calls] == [
            (name, json.loads(arguments)) for name, arguments in calls
        ]
        assert parsed.content is None
    for calls in (
        [("fly", "{}")],
        [("get_weather", "{}")],
        [("get_weather", '{"city": "Paris", "days": "x"}' if tools.writing.argument else '{"city": 5}')],
        [("get_weather", '{"city": "Paris", "more": 5}')],
    ):
        assert not follower.takes(grammar, _written(tools, *calls)), calls
    for text in ("", "Hello", " " + _written(tools, PARIS), _written(tools, PARIS)[:-8]):
        assert not follower.takes(grammar, text), text


@FORMATS
def test_one_call_at_most(follower: Follower, tools: ToolFormat) -> None:
    grammar = _grammar(follower, ToolChoice((NOW,), is_required=True, max_calls=1), OutputSyntax(tools))
    assert follower.takes(grammar, _written(tools, NOW_CALL))
    assert not follower.takes(grammar, _written(tools, NOW_CALL, NOW_CALL))


@FORMATS
def test_strict_calls_may_come_but_must_be_right(follower: Follower, tools: ToolFormat) -> None:
    choice, syntax = ToolChoice((STRICT, NOW)), OutputSyntax(tools)
    if tools is HARMONY:
        assert tool_grammar(choice, syntax, follower.tokens) is None
        return
    grammar = _grammar(follower, choice, syntax)
    rome, paris = ("get_weather", '{"city": "Rome"}'), PARIS
    free = "" if tools.writing.is_plain_alone or tools in (LLAMA3_JSON, PYTHONIC) else "Let me see.\n"
    for text in ("", "Hello {you} [1]!", _written(tools, rome), free + _written(tools, NOW_CALL, rome)):
        assert follower.takes(grammar, text), text
    for text in (_written(tools, paris), free + _written(tools, rome, paris)):
        assert not follower.takes(grammar, text), text
    assert tool_grammar(ToolChoice((WEATHER, NOW)), syntax, follower.tokens) is None


@pytest.mark.parametrize("is_open", [True, False])
def test_thoughts_come_before_required_calls(follower: Follower, is_open: bool) -> None:
    syntax = OutputSyntax(HERMES, THINK, is_reasoning=is_open)
    grammar = _grammar(follower, ToolChoice((NOW,), is_required=True), syntax)
    call = _written(HERMES, NOW_CALL)
    begin = "" if is_open else "<think>"
    assert follower.takes(grammar, f"{begin}\nHm {{}}.\n</think>\n\n{call}")
    assert follower.takes(grammar, call) is not is_open
    assert not follower.takes(grammar, f"{begin}Hm.</think>Yes")
    assert not follower.takes(grammar, f"{begin}Hm.")


def test_thoughts_whose_markers_are_no_tokens(tokenizer: Tokenizer) -> None:
    follower = Follower(tokenizer._backend, tokenizer.eos_token_ids)
    syntax = OutputSyntax(JSON, THINK)
    grammar = tool_grammar(ToolChoice((NOW,), is_required=True), syntax, {})
    call = _written(JSON, NOW_CALL)
    assert follower.takes(grammar, f"<think>Hm </thi.</think>\n{call}")
    assert follower.takes(grammar, call)
    assert not follower.takes(grammar, "<think>Hm.</think>Yes")


def test_harmony_thinks_before_it_calls(follower: Follower) -> None:
    syntax = OutputSyntax(HARMONY, HARMONY_REASONING)
    grammar = _grammar(follower, ToolChoice((NOW,), is_required=True), syntax)
    call = _written(HARMONY, NOW_CALL)
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    assert follower.takes(grammar, call)
    assert follower.takes(grammar, thought + call)
    assert not follower.takes(grammar, thought)


def test_a_budget_ends_the_thoughts(follower: Follower) -> None:
    syntax = OutputSyntax(None, THINK, is_reasoning=True)
    grammar = _grammar(follower, ToolChoice(), syntax, budget=5)
    assert follower.takes(grammar, "one two three</think>four five six seven eight nine")
    assert follower.takes(grammar, "one two three four five</think>six")
    assert not follower.takes(grammar, "one two three four five six</think>")
    assert not follower.takes(grammar, "one two three four five six")
    assert tool_grammar(ToolChoice(), syntax, follower.tokens) is None


def test_a_budget_where_the_end_is_no_control_token(tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.add_tokens([tokenizers.AddedToken("</think>", normalized=False)])
    follower = Follower(backend, tokenizer.eos_token_ids)
    syntax = OutputSyntax(None, THINK, is_reasoning=True)
    grammar = _grammar(follower, ToolChoice(), syntax, budget=5)
    assert follower.takes(grammar, "one two three</think>four five six seven eight nine")
    assert follower.takes(grammar, "one two three four five</think>six")
    assert not follower.takes(grammar, "one two three four five six</think>")


TAGGED = pytest.mark.parametrize("tools", [QWEN3_CODER, GLM45, MINIMAX_M2], ids=lambda each: each.name)


@TAGGED
def test_values_without_quotes_keep_to_their_schemas(follower: Follower, tools: ToolFormat) -> None:
    unit = {"$ref": "#/$defs/Unit"}
    properties = {
        "text": {"type": "string", "maxLength": 12},
        "unit": unit,
        "count": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "list": {"type": "array", "items": unit},
    }
    tool = _tool("f", properties, ["text", "unit", "count"])
    tool["function"]["parameters"]["$defs"] = {"Unit": {"enum": ["C", "F"], "type": "string"}}
    grammar = _grammar(follower, ToolChoice((tool,), is_required=True), OutputSyntax(tools))
    good = {"text": 'a\n"<b>" 5', "unit": "C", "count": 3}
    for more in ({}, {"count": None}, {"text": ""}, {"list": ["C"]}):
        assert follower.takes(grammar, _written(tools, ("f", json.dumps(good | more)))), more
    for more in ({"text": "more than that"}, {"unit": "K"}, {"count": "x"}, {"list": ["K"]}, {"other": 1}):
        assert not follower.takes(grammar, _written(tools, ("f", json.dumps(good | more)))), more
