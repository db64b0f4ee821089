"""Grammars as the engine takes them: llguidance's own form, made from what clients write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance

# Between the parts of a JSON text: one space, or a line break and an indentation. Without a bound, small
# models are known to fill the whole answer with it.
_WHITESPACE = r" |\n[ \t]{0,40}"
_REGEX_LETTERS = {ord(letter): f"\\{letter}" for letter in r"\.+*?()|[]{}^$/"} | {
    ord("\n"): r"\n",
    ord("\r"): r"\r",
}


class GrammarSourceError(ValueError):
    """What the client wrote is no grammar; the message continues "Invalid 'field': "."""


@dataclass(frozen=True, slots=True)
class Tag:
    """A structure in free text: ``begin``, a JSON value for ``schema``, ``end``."""

    begin: str
    schema: Mapping[str, Any] | bool
    end: str


def from_json_schema(
    schema: Mapping[str, Any] | bool,
    *,
    is_lenient: bool = False,
    whitespace: str | None = None,
) -> str:
    """JSON texts that satisfy a schema.

    Args:
        is_lenient: ignore what cannot be enforced, rather than refuse the schema.
        whitespace: a regex for what may stand between the parts; "" for nothing.
    """
    options = {"lenient": is_lenient, "whitespace_pattern": _WHITESPACE if whitespace is None else whitespace}
    if whitespace == "":
        options = {"lenient": is_lenient, "whitespace_flexible": False}
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return llguidance.LLMatcher.grammar_from_json_schema(_dumps(schema), overrides=options)  # type: ignore[arg-type]


def from_regex(regex: str) -> str:
    """Texts that a regex matches as a whole, in the syntax of Rust's ``regex``; ``\\d`` is 0 to 9."""
    regex = regex.removeprefix("^")
    if regex.endswith("$") and (len(regex) - len(regex[:-1].rstrip("\\"))) % 2:
        regex = regex[:-1]
    return llguidance.LLMatcher.grammar_from_lark(f"start: /{llguidance.regex_to_lark(regex, 'd')}/")


def from_choices(choices: Sequence[str]) -> str:
    """One of some texts."""
    regex = "|".join(choice.translate(_REGEX_LETTERS) for choice in choices)
    return llguidance.LLMatcher.grammar_from_lark(f"start: /{regex}/")


def from_grammar(text: str) -> str:
    """A grammar in llguidance's variant of Lark, or in llama.cpp's GBNF.

    Raises:
        GrammarSourceError: it is written like GBNF, and wrong.
    """
    try:
        return llguidance.grammar_from("grammar", text)
    except (ValueError, RecursionError, IndexError) as error:
        raise GrammarSourceError(str(error)) from None


def from_tags(tags: Sequence[Tag], triggers: Sequence[str], special_tokens: frozenset[str]) -> str:
    """Free text in which each occurrence of a trigger begins one of the tags that start with it.

    Args:
        special_tokens: names of control tokens; a trigger that is one of them stands for the token.

    Raises:
        GrammarSourceError: a tag starts with no trigger.
    """
    rules = []
    names = []
    for number, tag in enumerate(tags):
        trigger = max((t for t in triggers if tag.begin.startswith(t)), key=len, default=None)
        if trigger is None:
            raise GrammarSourceError(f"structure {number} begins with none of the triggers")
        rest = tag.begin[len(trigger) :]
        body = " ".join(
            part
            for part in (_lark_text(rest), f"%json {_dumps(_json(tag.schema))}", _lark_text(tag.end))
            if part
        )
        names.append(f"tag_{number}")
        if trigger in special_tokens:
            rules.append(f"tag_{number}: TEXT {trigger} {body}")
        else:
            rules += [
                f"trigger_{number}[lazy]: TEXT {_lark_text(trigger)}",
                f"tag_{number}: trigger_{number} {body}",
            ]
    lines = [f"start: ({' | '.join(names)})* rest", "rest: TEXT", r"TEXT: /(.|\n)*/", *rules]
    return llguidance.LLMatcher.grammar_from_lark("\n".join(lines))


def parse_schema(text: str) -> dict[str, Any] | bool:
    """A JSON schema that was sent as text. Raises GrammarSourceError."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise GrammarSourceError("it is no valid JSON") from None
    if not isinstance(schema, dict | bool):
        raise GrammarSourceError("a JSON schema is an object")
    return schema


def _json(schema: Mapping[str, Any] | bool) -> Mapping[str, Any]:
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}


def _lark_text(text: str) -> str:
    return json.dumps(text) if text else ""


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        raise GrammarSourceError("it is nested too deeply") from None
