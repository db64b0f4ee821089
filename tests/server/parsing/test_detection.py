from __future__ import annotations

import pytest

from server.chat_template import ChatTemplate
from server.model_formats import ModelFormats, model_formats
from server.parsing.detection import reasoning_format_of, tool_format_of
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
    MISTRAL_THINK,
    PYTHONIC,
    PYTHONIC_MARKED,
    QWEN3_CODER,
    SEED_THINK,
    THINK,
)
from tests.server.text_fixtures import TEMPLATES


@pytest.mark.parametrize(
    ("source", "tools", "reasoning"),
    [
        ("{{ '<tool_call>\\n{\"name\": ' }}", HERMES, None),
        ("{{ '<think>' + thought + '</think>' }}<tool_call>", HERMES, THINK),
        ("<tool_call>\n<function={{ name }}>\n<parameter={{ key }}>", QWEN3_CODER, None),
        ("</think><tool_call>{{ name }}<arg_key>{{ key }}</arg_key><arg_value>", GLM45, THINK),
        ("<minimax:tool_call>{{ '<invoke name=\"' + name }}<parameter name=", MINIMAX_M2, None),
        ("<seed:tool_call>\n<function={{ name }}>\n<parameter=", None, None),
        ("<tool_call>{{ '<invoke name=' }}", None, None),
        ("{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' }}", DEEPSEEK, None),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>x\n```json\n", DEEPSEEK_BLOCKS, None),
        ("{{ '[TOOL_CALLS][' }}", MISTRAL, None),
        ("[THINK]x[/THINK][TOOL_CALLS]x[ARGS]", MISTRAL_NAMED, MISTRAL_THINK),
        ('Environment: ipython "parameters": ', LLAMA3_JSON, None),
        ("<|python_tag|>", LLAMA3_JSON, None),
        ("<|python_start|>[", PYTHONIC, None),
        ("<|tool_call_start|>[", PYTHONIC_MARKED, None),
        ("<seed:think></seed:think>", None, SEED_THINK),
        ("<|start|>assistant<|channel|>final<|message|>", HARMONY, HARMONY_REASONING),
        ("{{ content.split('</think>')[-1] }}", None, THINK),
        ("<|im_start|>", None, None),
    ],
)
def test_templates(source: str, tools: object, reasoning: object) -> None:
    assert tool_format_of(source) is tools
    assert reasoning_format_of(source) is reasoning


def _template(name: str) -> ChatTemplate:
    return ChatTemplate((TEMPLATES / f"{name}.jinja").read_text())


def test_of_a_model() -> None:
    assert model_formats(_template("thinking")) == ModelFormats(HERMES, THINK, template_takes_tools=True)
    assert model_formats(_template("chatml")) == ModelFormats(JSON, None, template_takes_tools=False)
    assert model_formats(None) == ModelFormats(JSON, None, template_takes_tools=False)


def test_a_template_whose_calls_nobody_reads_is_told_of_tools_by_us() -> None:
    source = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}<tool_call><invoke"
    assert ChatTemplate(source).takes_tools
    assert model_formats(ChatTemplate(source)) == ModelFormats(JSON, None, template_takes_tools=False)


def test_the_operator_has_the_last_word() -> None:
    formats = model_formats(_template("thinking"), "pythonic", "none")
    assert formats == ModelFormats(PYTHONIC, None, template_takes_tools=True)
    assert model_formats(_template("chatml"), "none", "think") == ModelFormats(None, THINK, False)


def test_the_template_for_tools_counts() -> None:
    sources = {
        "default": "{% for m in messages %}{{ m.content }}{% endfor %}",
        "tool_use": "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}[TOOL_CALLS]",
    }
    assert model_formats(ChatTemplate(sources)) == ModelFormats(MISTRAL, None, template_takes_tools=True)
