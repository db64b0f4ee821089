"""Chat templates: the same text as transformers writes, and clear errors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from server import chat_template
from server.chat_template import ChatTemplate, ChatTemplateError
from server.gguf_metadata import read_gguf_metadata
from tests.server.text_fixtures import TEMPLATES, chat_cases, read_fixture

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Where transformers fails or prints a Python list, messages are adapted here: see the tests below.
OWN_ANSWERS = {
    "parts": {"chatml", "headers", "brackets", "features", "thinking", "smollm2"},
    "no_content": {"chatml", "brackets", "thinking", "smollm2"},
    "tools": {"chatml", "smollm2"},
}

CASES = [
    case for case in chat_cases() if case["template"] not in OWN_ANSWERS.get(case["conversation"], set())
]


@pytest.fixture(scope="session")
def templates(smollm2_path: Path) -> dict[str, ChatTemplate]:
    sources = {path.stem: path.read_text("utf-8") for path in TEMPLATES.glob("*.jinja")}
    sources["smollm2"] = read_gguf_metadata(smollm2_path)["tokenizer.chat_template"]
    return {name: ChatTemplate(source, SPECIAL) for name, source in sources.items()}


@pytest.mark.parametrize("case", CASES, ids=[f"{case['template']}-{case['conversation']}" for case in CASES])
def test_renders_as_transformers_does(case: dict[str, Any], templates: dict[str, ChatTemplate]) -> None:
    template = templates[case["template"]]

    def render() -> str:
        return template.render(
            case["messages"],
            tools=case.get("tools"),
            add_generation_prompt=case.get("add_generation_prompt", True),
            **case.get("variables", {}),
        )

    if "error" in case:
        with pytest.raises(ChatTemplateError) as raised:
            render()
        assert case["error"] in str(raised.value)
    else:
        assert render() == case["text"]


def test_the_cases_cover_texts_and_errors() -> None:
    assert sum("error" in case for case in CASES) >= 5
    assert sum("text" in case for case in CASES) > 50


@pytest.mark.parametrize("name", sorted(OWN_ANSWERS["parts"]))
def test_text_parts_become_one_string_for_templates_that_want_strings(
    name: str, templates: dict[str, ChatTemplate]
) -> None:
    messages = read_fixture("conversations.json")["parts"]["messages"]
    flat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " first \nsecond"}]
    assert templates[name].render(messages) == templates[name].render(flat)


def test_a_template_that_reads_parts_only_gets_parts() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% for part in m.content %}{{ part.text }};{% endfor %}{% endfor %}"
    )
    assert template.render([{"role": "user", "content": "hello"}]) == "hello;"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == "a;b;"


@pytest.mark.parametrize("name", sorted(OWN_ANSWERS["tools"]))
def test_missing_content_is_empty_where_the_template_needs_some(
    name: str, templates: dict[str, ChatTemplate]
) -> None:
    messages = read_fixture("conversations.json")["tools"]["messages"]
    filled = [{**message, "content": message["content"] or ""} for message in messages]
    assert templates[name].render(messages) == templates[name].render(filled)


def test_arguments_of_tool_calls_may_be_json_text(templates: dict[str, ChatTemplate]) -> None:
    conversation = read_fixture("conversations.json")["tools"]
    messages = json.loads(json.dumps(conversation["messages"]))
    function = messages[1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    expected = next(c for c in CASES if (c["template"], c["conversation"]) == ("headers", "tools"))
    assert templates["headers"].render(messages, tools=conversation["tools"]) == expected["text"]
    function["arguments"] = "not JSON"
    assert '"parameters": "not JSON"' in templates["headers"].render(messages, tools=conversation["tools"])


def test_tools_choose_the_template_named_tool_use() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools | length }} tools"})
    message = [{"role": "user", "content": "x"}]
    assert template.render(message) == "plain"
    assert template.render(message, tools=[{}]) == "1 tools"
    with pytest.raises(ChatTemplateError, match="'default'"):
        ChatTemplate({"tool_use": "x", "rag": "y"})


def test_variables_are_those_that_clients_may_set(templates: dict[str, ChatTemplate]) -> None:
    assert templates["smollm2"].variables == templates["chatml"].variables == frozenset()
    # Also names that are set in one branch and read in another: Jinja cannot tell where they come from.
    assert templates["headers"].variables == {"date_string", "system_message", "call"}
    assert templates["thinking"].variables == {"enable_thinking", "content", "thought"}


def test_a_variable_cannot_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages | length }}{{ bos_token }}", SPECIAL)
    assert template.render([{"role": "user", "content": "x"}], bos_token="?") == "1?"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('Only users, please') }}", "refuses these messages: Only users, please"),
        ("{{ messages[0].nothing.more }}", "needs something that these messages lack"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ messages[9].content }}", "lack"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError|lack"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{{ namespace(__init__=1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError|lack"),
        ("{{ range(10**9) | list | length }}", "OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_failing_templates_give_clear_errors(source: str, reason: str) -> None:
    template = ChatTemplate(source)
    with pytest.raises(ChatTemplateError, match=reason):
        template.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for %}", "not valid Jinja \\(line 1"),
        ("{% include 'x' %}{{", "not valid Jinja"),
        ("{{ x | no_such_filter }}", "not valid Jinja"),
        ("x" * (chat_template.MAX_TEMPLATE_CHARS + 1), "too long"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "too deeply nested"),
    ],
)
def test_unusable_templates_are_refused_at_once(source: str, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=reason):
        ChatTemplate(source)


def test_no_messages_are_an_error(templates: dict[str, ChatTemplate]) -> None:
    with pytest.raises(ChatTemplateError, match="empty"):
        templates["chatml"].render([])


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 10_000)
    template = ChatTemplate("{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}")
    with pytest.raises(ChatTemplateError, match="too long"):
        template.render([{"role": "user", "content": "x"}])


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MAX_RENDER_S", 0.3)
    template = ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    began = time.monotonic()
    with pytest.raises(ChatTemplateError, match="takes longer than"):
        template.render([{"role": "user", "content": "x"}])
    assert time.monotonic() - began < 3


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}]
    before = json.dumps(messages)
    ChatTemplate("{{ messages[0].tool_calls[0].function.arguments }}").render(messages)
    assert json.dumps(messages) == before


def test_no_other_jinja_template_is_within_reach() -> None:
    template = ChatTemplate("{% include 'other' %}")
    with pytest.raises(ChatTemplateError, match=r"TypeError|no loader"):
        template.render([{"role": "user", "content": "x"}])
