"""How many tokens the shortest text that follows a grammar has: a lower bound, from the numbers in it.

llguidance follows ``minItems: 1000000000`` as cheaply as ``minItems: 1``, so nothing but this says that no
answer of a model with 8,192 tokens can have so many items. Each value of an array or object counts as a token
at least, text as its characters by those of the longest token. What is not understood counts as nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from server.shortest_match import shortest_match

_PART_OF_POINTER = str.maketrans({"~": "~0", "/": "~1"})
_ONE_REGEX = re.compile(r"start: /(.*)/", re.DOTALL)
_SCHEMA_IN_LARK = re.compile(r"%json\s*(?=\{)")


def reason_it_cannot_fit(grammar: str, max_tokens: int, chars_per_token: int) -> str | None:
    """Why no answer of so many tokens follows a grammar in llguidance's form; None if one may.

    Args:
        chars_per_token: of the longest token.
    """
    lengths = _Lengths(chars_per_token)
    try:
        for part in _parts(grammar):
            if isinstance(part, str):
                length = _Length(lengths.of_chars(shortest_match(part)), "it")
            else:
                length = lengths.of_schema(part)
            if length.num_tokens > max_tokens:
                return f"no answer is long enough: {length.because} takes more than {max_tokens} tokens"
    except RecursionError:  # llguidance has a word to say about its depth
        pass
    return None


def _parts(grammar: str) -> Iterator[str | Mapping[str, Any]]:
    """The JSON schemas of a grammar, or its regex if it is one."""
    try:
        grammars = json.loads(grammar)["grammars"]
    except ValueError:
        grammars = [{"lark_grammar": grammar}]
    for one in grammars:
        schema, lark = one.get("json_schema"), one.get("lark_grammar") or ""
        if isinstance(schema, Mapping):
            yield schema
        if (regex := _ONE_REGEX.fullmatch(lark)) is not None:
            yield regex[1]
        for found in _SCHEMA_IN_LARK.finditer(lark):
            try:
                yield json.JSONDecoder().raw_decode(lark, found.end())[0]
            except ValueError:
                continue


@dataclass(frozen=True, slots=True)
class _Length:
    """At least ``num_tokens``, most of them for what ``because`` names."""

    num_tokens: int
    because: str = ""


_ONE = _Length(1)


class _Lengths:
    def __init__(self, chars_per_token: int) -> None:
        self._chars_per_token = chars_per_token
        self._root: Any = None
        # By identity: what is referred to from many places is looked at once, and a circle ends.
        self._known: dict[int, _Length] = {}

    def of_chars(self, num_chars: int) -> int:
        """Tokens of a text with so many characters."""
        return max(1, -(-num_chars // self._chars_per_token))

    def of_schema(self, schema: Mapping[str, Any]) -> _Length:
        self._root = schema
        self._known = {}
        return self._of(schema, "")

    def _of(self, schema: Any, at: str) -> _Length:
        if not isinstance(schema, Mapping):
            return _ONE
        if id(schema) not in self._known:
            self._known[id(schema)] = _ONE
            self._known[id(schema)] = max(self._demands(schema, at), key=lambda length: length.num_tokens)
        return self._known[id(schema)]

    def _demands(self, schema: Mapping[str, Any], at: str) -> Iterator[_Length]:
        """Bounds that hold all at once."""
        yield _ONE
        if isinstance(reference := schema.get("$ref"), str):
            yield self._of(_referred(self._root, reference), reference.removeprefix("#"))
        if isinstance(schemas := schema.get("allOf"), list):
            yield from (self._of(one, f"{at}/allOf/{number}") for number, one in enumerate(schemas))
        for name in ("anyOf", "oneOf"):
            if isinstance(schemas := schema.get(name), list) and schemas:
                yield _least(self._of(one, f"{at}/{name}/{number}") for number, one in enumerate(schemas))
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list) and values:
            name = "const" if "const" in schema else "enum"
            # Escapes are longer than what they stand for.
            chars = min(len(json.dumps(value, ensure_ascii=False)) for value in values)
            yield _Length(self.of_chars(chars), _named(name, at))
        types = schema.get("type")
        if types is not None:
            types = types if isinstance(types, list) else [types]
            yield _least(self._of_type(name, schema, at) for name in types)

    def _of_type(self, name: Any, schema: Mapping[str, Any], at: str) -> _Length:
        if name == "string":
            chars = _count(schema, "minLength")
            bound = _Length(self.of_chars(chars), _named("minLength", at))
            if isinstance(pattern := schema.get("pattern"), str):
                chars = shortest_match(pattern)
                return max(bound, _Length(self.of_chars(chars), _named("pattern", at)), key=_num_tokens)
            return bound
        if name == "array":
            return self._of_array(schema, at)
        return self._of_object(schema, at) if name == "object" else _ONE

    def _of_array(self, schema: Mapping[str, Any], at: str) -> _Length:
        count = _count(schema, "minItems")
        first = schema.get("prefixItems")
        first = first[:count] if isinstance(first, list) else []
        parts = [self._of(one, f"{at}/prefixItems/{number}") for number, one in enumerate(first)]
        rest = self._of(schema.get("items"), f"{at}/items")
        num_others = count - len(parts)
        num_tokens = sum(map(_num_tokens, parts)) + num_others * rest.num_tokens
        longest = max([rest, *parts] if num_others else parts, key=_num_tokens, default=_ONE)
        if longest.num_tokens > num_others:
            return _Length(num_tokens, longest.because)
        return _Length(max(1, num_tokens), _named("minItems", at))

    def _of_object(self, schema: Mapping[str, Any], at: str) -> _Length:
        count = _count(schema, "minProperties")
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, Mapping):
            properties = {}
        parts = [
            self._of(properties.get(name), f"{at}/properties/{name.translate(_PART_OF_POINTER)}")
            for name in (required if isinstance(required, list) else [])
            if isinstance(name, str)
        ]
        num_tokens = sum(map(_num_tokens, parts))
        if count > num_tokens:
            return _Length(count, _named("minProperties", at))
        longest = max(parts, key=_num_tokens, default=_ONE)
        if longest.num_tokens > len(parts):
            return _Length(num_tokens, longest.because)
        return _Length(max(1, num_tokens), _named("required", at))


def _num_tokens(length: _Length) -> int:
    return length.num_tokens


def _least(lengths: Iterator[_Length]) -> _Length:
    return min(lengths, key=_num_tokens, default=_ONE)


def _named(keyword: str, at: str) -> str:
    return f"'{keyword}' at '{at}'" if at else f"'{keyword}'"


def _count(schema: Mapping[str, Any], name: str) -> int:
    value = schema.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return 0
    return max(0, math.ceil(value))


def _referred(root: Any, reference: str) -> Any:
    """What a reference within the schema points to; None if it is of another kind, or wrong."""
    if not reference.startswith("#"):
        return None
    found = root
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
