"""What an answer must look like if it has to call tools, or to stop thinking in time: a grammar.

The grammars are in llguidance's variant of Lark. Control tokens are named by their ids: no spelling in other
tokens passes for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.parsing.argument_types import referred, types_of
from server.parsing.call_writing import ArgumentWriting, CallWriting
from server.parsing.formats import HARMONY, HARMONY_REASONING, ReasoningFormat, ToolFormat
from server.parsing.output_parser import OutputSyntax
from server.text_before import text_before
from server.tool_choice import ToolChoice

# Of an answer that must be calls: small models would never come to an end.
MAX_REQUIRED_CALLS = 16
ANSWER = "answer"
# Between the parts of JSON, for the same reason.
_WHITESPACE = r" |\n[ \t]{0,40}"
# Longer strings are not counted: a grammar of them takes long to follow.
_MAX_COUNTED_CHARS = 2000
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def tool_grammar(
    choice: ToolChoice,
    syntax: OutputSyntax,
    tokens: Mapping[str, int],
    thinking_budget: int | None = None,
    *,
    has_answer: bool = False,
) -> str | None:
    """The grammar of an answer; None if it is free.

    - Calls that are required are all of the answer, behind the reasoning.
    - Calls that are not, of functions of which one is ``strict``, keep to the schemas of their functions. In
      formats without markers, an answer in words then may not begin like a call. Harmony's are not enforced.
    - Otherwise, only a budget constrains the answer: its reasoning ends after so many tokens.

    Args:
        tokens: ids of those markers that are control tokens, and of the end of the reasoning if it is one
            token of any kind.
        thinking_budget: in tokens.
        has_answer: content must follow the grammar named ``ANSWER``, which the caller adds. Calls may take
            its place.
    """
    grammar, tools = _Grammar(tokens), syntax.tools
    is_strict = any(tool["function"].get("strict") for tool in choice.tools)
    if tools is not None and choice.is_required:
        body = grammar.calls(choice, tools.writing)
    elif has_answer:
        if syntax.reasoning is None and not choice.tools:
            return None
        body = f"@{ANSWER}"
        if tools is not None:
            body = f"({grammar.calls(choice, tools.writing)} | {body})"
    elif tools is not None and tools is not HARMONY and is_strict:
        body = grammar.text_with_calls(choice, tools)
    elif thinking_budget is not None:
        body = grammar.free_body(syntax)
    else:
        return None
    return grammar.lark(f"{grammar.reasoning(syntax, thinking_budget)} {body}")


class _Grammar:
    """Rules, while they are put together. What methods return is the right side of a rule."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        self._rules = [r"TEXT: /(.|\n)*/", r"SPACE: /[ \n]{0,4}/"]
        names = sorted(tokens, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None

    def lark(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules])

    def calls(self, choice: ToolChoice, writing: CallWriting) -> str:
        """One call, or several if they are allowed."""
        for number, tool in enumerate(choice.tools):
            self._rules.append(f"call_{number}: {self._call(tool['function'], writing)}")
        names = [f"call_{number}" for number in range(len(choice.tools))]
        self._rules.append(f"call: {' | '.join(names)}")
        begin, end = self._text(writing.begin), self._text(writing.end)
        if choice.max_calls == 1 or writing.between is None:
            return "call" if writing.is_plain_alone else f"{begin} call {end}"
        between = self._text(writing.between)
        several = f"{begin} call ({between} call){{0,{MAX_REQUIRED_CALLS - 1}}} {end}"
        return f"(call | {several})" if writing.is_plain_alone else several

    def reasoning(self, syntax: OutputSyntax, budget: int | None) -> str:
        """What stands before the answer proper, maybe nothing."""
        format_ = syntax.reasoning
        if format_ is None:
            return ""
        begin = self._text(format_.begin)
        if format_ is HARMONY_REASONING:
            self._thought(format_, budget)
            return f"({begin} thought {self._text('<|start|>assistant')})?"
        self._thought(format_, budget)
        return "thought SPACE" if syntax.is_reasoning else f"({begin} thought SPACE)?"

    def text_with_calls(self, choice: ToolChoice, tools: ToolFormat) -> str:
        """Free text that calls may interrupt."""
        writing = tools.writing
        head = writing.begin + writing.before_name
        marker = next((marker for marker in tools.markers if head.startswith(marker)), None)
        if marker is None:
            self._rules.append(r"OTHER: /[^ \n{\[`<](.|\n)*/")
            return f"({self.calls(choice, writing)} | OTHER?)"
        if writing.begin:
            writing = replace(writing, begin=writing.begin[len(marker) :])
        else:  # each call has its marker
            writing = replace(writing, before_name=writing.before_name[len(marker) :], between=None)
        calls = self.calls(choice, writing)
        if marker in self._tokens:
            self._rules.append(f"section: TEXT {self._text(marker)} {calls}")
        elif (before := text_before(marker)) is not None:
            self._rules += [f"TRIGGER: /{before.until}/", f"section: TRIGGER {calls}"]
            free = f"/{before.without}/"
            return f"(section TEXT | {free})" if choice.max_calls == 1 else f"section* {free}"
        else:
            self._rules += [f"trigger[lazy]: TEXT {_quoted(marker)}", f"section: trigger {calls}"]
        return f"section{'?' if choice.max_calls == 1 else '*'} TEXT"

    def free_body(self, syntax: OutputSyntax) -> str:
        tokens = [f"<[{self._tokens[name]}]>" for name in sorted(syntax.markers & self._tokens.keys())]
        return f"({' | '.join(['TEXT', *tokens])})*"

    def _thought(self, format_: ReasoningFormat, budget: int | None) -> None:
        end = format_.end
        limit = "" if budget is None else f"[max_tokens={budget}]"
        if end in self._tokens:
            self._rules += [f"thought: thoughts {self._text(end)}", f"thoughts{limit}: TEXT"]
        elif (before := text_before(end)) is not None:
            self._rules.append(f"thought: /{before.until}/")
        else:
            self._rules.append(f"thought[lazy]: TEXT {json.dumps(end)}")

    def _call(self, function: Mapping[str, Any], writing: CallWriting) -> str:
        schema = function.get("parameters") or _ANY_OBJECT
        is_strict = bool(function.get("strict"))
        if writing.has_keywords:
            arguments = _keywords(schema, is_strict=is_strict)
        elif writing.argument is not None:
            arguments = self._arguments(schema, writing.argument, is_strict=is_strict)
        else:
            arguments = _json(schema, is_strict=is_strict)
        head = self._text(f"{writing.before_name}{function['name']}{writing.before_arguments}")
        return f"{head} {arguments} {self._text(writing.after_arguments)}"

    def _arguments(self, schema: Mapping[str, Any], writing: ArgumentWriting, *, is_strict: bool) -> str:
        """Arguments one after the other, in the order of the schema; of those not required, any."""
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, Mapping):
            return ""
        parts = []
        for name, value in properties.items():
            head = self._text(f"{writing.before_name}{name}{writing.before_value}")
            part = f"{head} {self._unquoted(value, schema, writing.after_value, is_strict=is_strict)}"
            parts.append(part if isinstance(required, list) and name in required else f"({part})?")
        return " ".join(parts)

    def _unquoted(self, schema: Any, root: Mapping[str, Any], end: str, *, is_strict: bool) -> str:
        """A value whose strings have no quotes, and the text that ends it.

        Of strings, ``enum``, ``const`` and ``maxLength`` are kept to; other values are JSON.
        """
        types = types_of(schema, root)
        if not isinstance(schema, Mapping):
            schema = {}
        elif isinstance(reference := schema.get("$ref"), str):  # as of an enumeration in Python
            target = referred(reference, root)
            schema = target if isinstance(target, Mapping) else {}
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list) and values:
            texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
            return f"({' | '.join(map(json.dumps, texts))}) {self._text(end)}"
        if types and "string" not in types:
            shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
            return f"{_value(schema, shared, is_strict=is_strict)} {self._text(end)}"
        longest = schema.get("maxLength")
        is_bounded = isinstance(longest, int) and 0 <= longest <= _MAX_COUNTED_CHARS
        text = rf"/(.|\n){{0,{longest}}}/" if is_bounded else "TEXT"
        if any(name in end for name in self._tokens):
            return f"{text} {self._text(end)}"
        rule = f"value_{len(self._rules)}"
        self._rules.append(f"{rule}[lazy]: {text} {_quoted(end)}")
        return rule

    def _text(self, text: str) -> str:
        """Literal text, in which control tokens are what they are."""
        parts, end = [], 0
        for found in self._names.finditer(text) if self._names is not None else ():
            parts += [_quoted(text[end : found.start()]), f"<[{self._tokens[found[0]]}]>"]
            end = found.end()
        return " ".join(part for part in (*parts, _quoted(text[end:])) if part)


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""


def _json(schema: Mapping[str, Any], *, is_strict: bool) -> str:
    options = {"whitespace_pattern": _WHITESPACE, "lenient": not is_strict}
    closed: Mapping[str, Any] = {}
    if schema.get("type", "object") == "object" and schema.get("properties"):
        # Otherwise small models add arguments of their own.
        closed = {"additionalProperties": False}
    return f"%json {json.dumps({**closed, **schema, 'x-guidance': options})}"


def _keywords(schema: Mapping[str, Any], *, is_strict: bool) -> str:
    """Arguments with their names: those that are required, then any of the others."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or not properties:
        return ""
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    written = {
        name: f"{_quoted(f'{name}=')} {_value(value, shared, is_strict=is_strict)}"
        for name, value in properties.items()
        if name.isidentifier()
    }
    required = schema.get("required")
    needed = [name for name in written if isinstance(required, list) and name in required]
    others = [name for name in written if name not in needed]
    comma = _quoted(", ")

    def optional(names: list[str]) -> str:
        return " ".join(f"({comma} {written[name]})?" for name in names)

    if needed:
        return f"{f' {comma} '.join(written[name] for name in needed)} {optional(others)}"
    firsts = [f"{written[name]} {optional(others[place + 1 :])}" for place, name in enumerate(others)]
    return f"({' | '.join(firsts)})?" if firsts else ""


def _value(schema: Any, shared: Mapping[str, Any], *, is_strict: bool) -> str:
    if not isinstance(schema, Mapping):
        schema = {}
    options = {"whitespace_pattern": _WHITESPACE, "lenient": not is_strict}
    return f"%json {json.dumps({**shared, **schema, 'x-guidance': options})}"
