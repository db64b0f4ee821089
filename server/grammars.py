"""Grammars as the engine takes them: llguidance's own form, made from what clients write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance

from server.text_before import text_before

# Between the parts of a JSON text: one space, or a line break and an indentation. Without a bound, small
# models are known to fill the whole answer with it.
_WHITESPACE = r" |\n[ \t]{0,40}"
_REGEX_LETTERS = {ord(letter): f"\\{letter}" for letter in r"\.+*?()|[]{}^$/"} | {
    ord("\n"): r"\n",
    ord("\r"): r"\r",
}


MAX_GRAMMAR_BYTES = 256 * 1024
# Translated to Lark by Python code, 1 MB/s.
_MAX_GBNF_BYTES = 64 * 1024


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
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(_dumps(schema), overrides=options)  # type: ignore[arg-type]
    except ValueError as error:
        raise GrammarSourceError(str(error)) from None


def from_regex(regex: str) -> str:
    """Texts that a regex matches as a whole, in the syntax of Rust's ``regex``; ``\\d`` is 0 to 9."""
    _check_length(regex)
    regex = regex.removeprefix("^")
    if regex.endswith("$") and (len(regex) - len(regex[:-1].rstrip("\\"))) % 2:
        regex = regex[:-1]
    return llguidance.LLMatcher.grammar_from_lark(f"start: /{llguidance.regex_to_lark(regex, 'd')}/")


def from_choices(choices: Sequence[str]) -> str:
    """One of some texts."""
    _check_length("".join(choices))
    regex = "|".join(choice.translate(_REGEX_LETTERS) for choice in choices)
    return llguidance.LLMatcher.grammar_from_lark(f"start: /{regex}/")


def from_grammar(text: str) -> str:
    """A grammar in llguidance's variant of Lark, or in llama.cpp's GBNF.

    Raises:
        GrammarSourceError: it is written like GBNF, and wrong.
    """
    _check_length(text, _MAX_GBNF_BYTES if "::=" in text else MAX_GRAMMAR_BYTES)
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
    starts: list[tuple[str, str]] = []
    for number, tag in enumerate(tags):
        trigger = max((t for t in triggers if tag.begin.startswith(t)), key=len, default=None)
        if trigger is None:
            raise GrammarSourceError(f"structure {number} begins with none of the triggers")
        rest = tag.begin[len(trigger) :]
        parts = (_lark_text(rest), f"%json {_dumps(_json(tag.schema))}", _lark_text(tag.end))
        starts.append((trigger, " ".join(part for part in parts if part)))
    used = {trigger for trigger, _ in starts}
    only = text_before(used.pop()) if len(used) == 1 and not used & special_tokens else None
    lines = [f"start: ({' | '.join(f'tag_{number}' for number in range(len(starts)))})* rest"]
    if only is not None:
        lines += [f"rest: /{only.without}/", f"HEAD: /{only.until}/"]
        lines += [f"tag_{number}: HEAD {body}" for number, (_, body) in enumerate(starts)]
        return llguidance.LLMatcher.grammar_from_lark("\n".join(lines))
    lines += ["rest: TEXT", r"TEXT: /(.|\n)*/"]
    for number, (trigger, body) in enumerate(starts):
        if trigger in special_tokens:
            lines.append(f"tag_{number}: TEXT {trigger} {body}")
        else:
            lines += [
                f"trigger_{number}[lazy]: TEXT {_lark_text(trigger)}",
                f"tag_{number}: trigger_{number} {body}",
            ]
    return llguidance.LLMatcher.grammar_from_lark("\n".join(lines))


def parse_schema(text: str) -> dict[str, Any] | bool:
    """A JSON schema that was sent as text. Raises GrammarSourceError."""
    _check_length(text)
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


def _dumps(schema: Mapping[str, Any]) -> str:
    """Raises GrammarSourceError if it becomes too long, before much time has gone into that."""
    rest: list[Any] = [schema]
    num_bytes = 0
    while rest and num_bytes <= MAX_GRAMMAR_BYTES:
        value = rest.pop()
        num_bytes += 1
        if isinstance(value, str):
            num_bytes += len(value)
        elif isinstance(value, Mapping):
            rest += value
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise GrammarSourceError(_too_long(MAX_GRAMMAR_BYTES))
    try:
        return json.dumps(schema)
    except RecursionError:
        raise GrammarSourceError("it is nested too deeply") from None


def _check_length(text: str, limit: int = MAX_GRAMMAR_BYTES) -> None:
    if len(text) > limit:
        raise GrammarSourceError(_too_long(limit))


def _too_long(limit: int) -> str:
    return f"it is longer than {limit} bytes"
