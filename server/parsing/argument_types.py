"""Which JSON types the arguments of functions have, for calls that write them without quotes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

# By function and argument; what no schema tells is left out.
ArgumentTypes = Mapping[str, Mapping[str, frozenset[str]]]

_MAX_REFERENCES = 64
_UNIONS = ("anyOf", "oneOf", "allOf")
# As Python writes them, which models trained on Python do too.
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}


def types_of_arguments(parameters: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """The types of those arguments whose schema tells them; ``parameters`` is the schema of all."""
    properties = parameters.get("properties")
    if not isinstance(properties, Mapping):
        return {}
    types = {name: types_of(schema, parameters) for name, schema in properties.items()}
    return {name: found for name, found in types.items() if found}


def types_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The types that a schema lets through, none if it does not tell. Takes time linear in the schemas.

    Args:
        root: what ``$ref`` refers to.
    """
    return _types(schema, root, set()) or frozenset()


def referred(reference: str, root: Any) -> Any:
    """What ``#/$defs/Name`` means in the schema ``root``; None if there is none."""
    start, *names = reference.split("/")
    for name in names if start == "#" else [""]:
        root = root.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root


def _types(schema: Any, root: Mapping[str, Any], followed: set[str]) -> frozenset[str] | None:
    """None if it does not tell."""
    if not isinstance(schema, Mapping):
        return None
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(each for each in kind if isinstance(each, str))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return frozenset(_type(value) for value in values)
    for name in _UNIONS:
        if isinstance(branches := schema.get(name), list):
            found = [_types(branch, root, followed) for branch in branches]
            told = [types for types in found if types is not None]
            return frozenset[str]().union(*told) if len(told) == len(found) else None
    reference = schema.get("$ref")
    if not isinstance(reference, str):
        return None
    if reference in followed:
        return frozenset()  # it adds nothing to what it has told
    if len(followed) == _MAX_REFERENCES:
        return None
    followed.add(reference)
    return _types(referred(reference, root), root, followed)


def argument_json(text: str, types: frozenset[str]) -> str:
    """The JSON value that ``text`` stands for, one of ``types`` if it can be.

    Text stays text where a string may stand, unless it is a value of another type that may stand there too.
    Where nothing is known of the type, numbers, constants, arrays and objects are what they look like.
    """
    if types == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    literal = text.strip()
    literal = _CONSTANTS.get(literal, literal)
    kind = _type_of_json(literal)
    if kind is not None and (
        ((kind in types or (kind == "integer" and "number" in types)) and kind != "string")
        or (types and "string" not in types)
        or (not types and kind != "string")
    ):  # fmt: skip
        return literal
    return json.dumps(text, ensure_ascii=False)


def _type_of_json(literal: str) -> str | None:
    """None if it is no JSON."""
    try:
        return _type(json.loads(literal, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return None


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is no JSON")


def _type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"
