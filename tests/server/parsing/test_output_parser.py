from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.detokenizer import IncrementalDetokenizer
from server.parsing.deltas import (
    ContentDelta,
    Delta,
    ParsedAnswer,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    collected,
)
from server.parsing.formats import HERMES, MISTRAL, THINK, TOOL_FORMATS
from server.parsing.output_parser import OutputParser, OutputSyntax
from server.parsing.text_input import TextInput
from server.tokenizer import Tokenizer
from tests.server.parsing.answers import ANSWERS, NAMES, PARIS, Answer

all_answers = pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.name)


def _deltas(syntax: OutputSyntax, pieces: Iterable[str]) -> list[Delta]:
    parser = OutputParser(syntax)
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    deltas += parser.finish()
    assert parser.finish() == []
    _check_order(deltas)
    return deltas


def _check_order(deltas: list[Delta]) -> None:
    """Calls are numbered, and one ends before the next thing comes."""
    open_call, num_calls = None, 0
    for delta in deltas:
        match delta:
            case ToolCallStart(index):
                assert open_call is None
                assert index == num_calls
                open_call, num_calls = index, num_calls + 1
            case ToolCallArguments(index, text):
                assert text
                assert index == open_call
            case ToolCallEnd(index):
                assert index == open_call
                open_call = None
            case _:
                assert open_call is None
                assert delta.text
    assert open_call is None


def _parsed(syntax: OutputSyntax, *pieces: str) -> ParsedAnswer:
    return collected(_deltas(syntax, pieces))


@all_answers
def test_the_whole(answer: Answer) -> None:
    assert _parsed(answer.syntax, answer.text) == answer.parsed


@all_answers
def test_every_split_gives_the_same(answer: Answer) -> None:
    text = answer.text
    for at in range(len(text) + 1):
        assert _parsed(answer.syntax, text[:at], text[at:]) == answer.parsed, (text[:at], text[at:])
    assert _parsed(answer.syntax, *text) == answer.parsed
    for size in (2, 3, 5, 7):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert _parsed(answer.syntax, *pieces) == answer.parsed, pieces
    if len(text) <= 30:
        for first in range(len(text)):
            for second in range(first, len(text)):
                pieces = [text[:first], text[first:second], text[second:]]
                assert _parsed(answer.syntax, *pieces) == answer.parsed, pieces


@all_answers
def test_token_borders_give_the_same(answer: Answer, tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    pieces = [detokenizer.push((token_id,)) for token_id in tokenizer.encode(answer.text)]
    assert _parsed(answer.syntax, *pieces) == answer.parsed, pieces


_PIECES = [
    *(marker for each in TOOL_FORMATS.values() for marker in each.markers),
    *THINK.markers,
    '{"name": "now", "arguments": ', '{"name": ', '"now"', "get_weather(", "city=", "[", "]", "{", "}", ")",
    "(", '"', "'", "\\", ",", ":", "```", "json", "\n", " ", "a", "é", "1", "function", "to=functions.now",
    "\x00", "<parameter=city>", "</parameter>", "</function>", ">", '<invoke name="now">', "</invoke>",
    '<parameter name="city">',
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    tools=st.sampled_from([*TOOL_FORMATS.values(), None]),
    reasoning=st.sampled_from([THINK, None]),
    is_opened=st.booleans(),
    parts=st.lists(st.sampled_from(_PIECES), max_size=25),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_whatever_comes_splits_do_not_matter_and_markers_do_not_leak(
    tools: object, reasoning: object, is_opened: bool, parts: list[str], cuts: list[int]
) -> None:
    syntax = OutputSyntax(
        tools=tools,  # type: ignore[arg-type]
        reasoning=reasoning,  # type: ignore[arg-type]
        tool_names=NAMES,
        is_reasoning=is_opened and reasoning is not None,
    )
    text = "".join(parts)
    whole = _parsed(syntax, text)
    assert _parsed(syntax, *text) == whole
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert _parsed(syntax, *(text[a:b] for a, b in itertools.pairwise(borders))) == whole
    for marker in syntax.markers:
        # What is left when a marker is taken out may be one again; that is no marker of the model's.
        if marker in (whole.content or ""):
            assert marker not in text


def test_content_and_arguments_stream_as_they_come() -> None:
    parser = OutputParser(OutputSyntax(HERMES))
    assert parser.push("Hello") == [ContentDelta("Hello")]
    assert parser.push(" ") == []  # it may be the space before a call
    assert parser.push("you <") == [ContentDelta(" you")]
    assert parser.push("3") == [ContentDelta(" <3")]
    assert parser.push("\n<tool_call>\n{") == []
    assert parser.push('"name": "f", "argu') == [ToolCallStart(0, "f", "")]
    assert parser.push('ments": {"a') == [ToolCallArguments(0, '{"a')]
    assert parser.push('": "long') == [ToolCallArguments(0, '": "long')]
    assert parser.push('"}') == [ToolCallArguments(0, '"}')]
    assert parser.push("}") == [ToolCallEnd(0)]
    assert parser.push("\n</tool_call>") == []
    assert (parser.num_calls, parser.finish()) == (1, [])


def test_it_says_when_the_model_thinks() -> None:
    parser = OutputParser(OutputSyntax(reasoning=THINK, is_reasoning=True))
    parser.push("")
    assert parser.is_reasoning
    parser.push("Hm.</thi")
    assert parser.is_reasoning
    parser.push("nk>")
    assert not parser.is_reasoning


def test_ids_are_new_and_in_the_form_that_templates_take() -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {PARIS}}}</tool_call>' * 2
    first, second = _parsed(OutputSyntax(HERMES), text).tool_calls
    assert first.id.startswith("call_")
    assert first.id != second.id
    [call] = _parsed(OutputSyntax(MISTRAL), "[TOOL_CALLS]f[ARGS]{}").tool_calls
    assert len(call.id) == 9
    assert call.id.isalnum()


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize(
    "unit",
    [
        "<tool_call>{",
        '<tool_call>{"a": "',
        "[",
        '{"arguments": ',
        "[TOOL_CALLS][",
        " \n",
        "f(a=[",
        "<",
        "<function=f><parameter=a>",
    ],
)
def test_the_work_is_linear_in_the_text(name: str, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_handled = 0
    feed, take = TextInput.feed, TextInput._take

    def counted_feed(self: TextInput, text: str) -> None:
        nonlocal num_handled
        feed(self, text)
        num_handled += len(self._text)

    def counted_take(self: TextInput, end: int) -> str:
        nonlocal num_handled
        piece = take(self, end)
        num_handled += len(piece)
        return piece

    monkeypatch.setattr(TextInput, "feed", counted_feed)
    monkeypatch.setattr(TextInput, "_take", counted_take)
    text = unit * (20_000 // len(unit))
    _deltas(
        OutputSyntax(TOOL_FORMATS[name], THINK, NAMES), (text[at : at + 4] for at in range(0, len(text), 4))
    )
    # Each letter is fed and taken twice at most, and a marker's letters are held for a few pieces.
    assert num_handled < 12 * len(text)
