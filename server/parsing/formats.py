"""The formats of tool calls and of reasoning that are known, as data."""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

from server.parsing.call_syntax import CallSyntax, DeepSeekCalls, JsonCalls, MistralCalls
from server.parsing.call_writing import ArgumentWriting, CallWriting
from server.parsing.python_calls import PythonCalls
from server.parsing.xml_calls import CallTags, XmlCalls


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _short_call_id() -> str:
    """Mistral's templates take ids of nine letters and digits only."""
    return "".join(random.choices(string.ascii_letters + string.digits, k=9))


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls.

    Attributes:
        begins: markers that announce calls, anywhere in the content.
        ends: markers that end calls.
        others: further markers, which mean nothing by themselves.
        is_bare: an answer may also begin with a call that nothing announces. Such a call counts only if it
            calls one of the request's functions.
        syntax: what stands between ``begins`` and ``ends``.
        writing: how to write calls so that they can be read. One of several ways, where models differ.
    """

    name: str
    syntax: CallSyntax
    writing: CallWriting
    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    is_bare: bool = False
    new_call_id: Callable[[], str] = _call_id

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.begins, *self.ends, *self.others)


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model sets its thoughts off from its answer: between two markers."""

    name: str
    begin: str
    end: str

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin, self.end)


_DEEPSEEK_BEGIN = "<｜tool▁call▁begin｜>"
_DEEPSEEK_END = "<｜tool▁call▁end｜>"
_DEEPSEEK_ALL_BEGIN = "<｜tool▁calls▁begin｜>"
_DEEPSEEK_ALL_END = "<｜tool▁calls▁end｜>"
_DEEPSEEK_SEPARATOR = "<｜tool▁sep｜>"

_PLAIN_JSON = CallWriting('{"name": "', '", "arguments": ', "}", "[", "]", ", ", is_plain_alone=True)

HERMES = ToolFormat(
    "hermes",
    JsonCalls(("</tool_call>",)),
    CallWriting('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", between="\n"),
    ("<tool_call>",),
    ("</tool_call>",),
)
LLAMA3_JSON = ToolFormat(
    "llama3_json",
    JsonCalls(),
    CallWriting('{"name": "', '", "parameters": ', "}", between="; "),
    ("<|python_tag|>",),
    is_bare=True,
)
MISTRAL = ToolFormat(
    "mistral",
    MistralCalls(),
    CallWriting('{"name": "', '", "arguments": ', "}", "[TOOL_CALLS][", "]", ", "),
    ("[TOOL_CALLS]",),
    others=("[ARGS]", "[CALL_ID]"),
    new_call_id=_short_call_id,
)
MISTRAL_NAMED = replace(MISTRAL, writing=CallWriting("[TOOL_CALLS]", "[ARGS]", ""))
PYTHONIC = ToolFormat(
    "pythonic",
    PythonCalls(),
    CallWriting("", "(", ")", "[", "]", ", ", has_keywords=True),
    ("<|python_start|>", "<|tool_call_start|>"),
    ("<|python_end|>", "<|tool_call_end|>"),
    is_bare=True,
)
PYTHONIC_MARKED = replace(
    PYTHONIC,
    writing=CallWriting("", "(", ")", "<|tool_call_start|>[", "]<|tool_call_end|>", ", ", has_keywords=True),
)
DEEPSEEK = ToolFormat(
    "deepseek",
    DeepSeekCalls(_DEEPSEEK_SEPARATOR, (_DEEPSEEK_END, _DEEPSEEK_ALL_END)),
    CallWriting(_DEEPSEEK_BEGIN, _DEEPSEEK_SEPARATOR, _DEEPSEEK_END, _DEEPSEEK_ALL_BEGIN, _DEEPSEEK_ALL_END),
    (_DEEPSEEK_BEGIN,),
    (_DEEPSEEK_END,),
    (_DEEPSEEK_SEPARATOR, _DEEPSEEK_ALL_BEGIN, _DEEPSEEK_ALL_END),
)
DEEPSEEK_BLOCKS = replace(
    DEEPSEEK,
    writing=CallWriting(
        f"{_DEEPSEEK_BEGIN}function{_DEEPSEEK_SEPARATOR}",
        "\n```json\n",
        f"\n```{_DEEPSEEK_END}",
        _DEEPSEEK_ALL_BEGIN,
        _DEEPSEEK_ALL_END,
        "\n",
    ),
)
QWEN3_CODER = ToolFormat(
    "qwen3_coder",
    XmlCalls(
        CallTags(
            "<function=", ">", "<parameter=", ">", "", "</parameter>", ("</function>",),
            has_lines=True, announces_itself=True,
        ),
        "</tool_call>",
    ),
    CallWriting(
        "<tool_call>\n<function=",
        ">\n",
        "</function>\n</tool_call>",
        between="\n",
        argument=ArgumentWriting("<parameter=", ">\n", "\n</parameter>\n"),
    ),
    ("<tool_call>", "<function="),
    ("</tool_call>",),
)  # fmt: skip
GLM45 = ToolFormat(
    "glm45",
    XmlCalls(CallTags("", "", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", ()), "</tool_call>"),
    CallWriting(
        "<tool_call>",
        "\n",
        "</tool_call>",
        between="\n",
        argument=ArgumentWriting("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
    ),
    ("<tool_call>",),
    ("</tool_call>",),
    ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
MINIMAX_M2 = ToolFormat(
    "minimax_m2",
    XmlCalls(
        CallTags('<invoke name="', '">', '<parameter name="', '">', "", "</parameter>", ("</invoke>",)),
        "</minimax:tool_call>",
    ),
    CallWriting(
        '<invoke name="',
        '">\n',
        "</invoke>\n",
        "<minimax:tool_call>\n",
        "</minimax:tool_call>",
        argument=ArgumentWriting('<parameter name="', '">', "</parameter>\n"),
    ),
    ("<minimax:tool_call>",),
    ("</minimax:tool_call>",),
)
JSON = ToolFormat("json", JsonCalls(), _PLAIN_JSON, is_bare=True)
# What lies between the markers is read by a parser of its own.
HARMONY = ToolFormat(
    "harmony",
    JsonCalls(),
    CallWriting("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "", between=None),
    others=("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
)

THINK = ReasoningFormat("think", "<think>", "</think>")
MISTRAL_THINK = ReasoningFormat("mistral", "[THINK]", "[/THINK]")
SEED_THINK = ReasoningFormat("seed", "<seed:think>", "</seed:think>")
HARMONY_REASONING = ReasoningFormat("harmony", "<|channel|>analysis<|message|>", "<|end|>")

AUTO, NONE = "auto", "none"
TOOL_FORMATS = {
    each.name: each
    for each in (
        HERMES, LLAMA3_JSON, MISTRAL, PYTHONIC, DEEPSEEK, QWEN3_CODER, GLM45, MINIMAX_M2, JSON, HARMONY,
    )
}  # fmt: skip
REASONING_FORMATS = {each.name: each for each in (THINK, MISTRAL_THINK, SEED_THINK, HARMONY_REASONING)}
# What the operator may say.
TOOL_PARSERS = (AUTO, NONE, *TOOL_FORMATS)
REASONING_PARSERS = (AUTO, NONE, *REASONING_FORMATS)
