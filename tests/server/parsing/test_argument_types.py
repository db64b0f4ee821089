from __future__ import annotations

import json
from typing import Any

import pytest

from server.parsing.argument_types import argument_json, types_of_arguments

DEFS = {
    "Unit": {"enum": ["C", 3, None]},
    "Tree": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Tree"}]},
    "a/b": {"const": True},
}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"enum": ["a", "b"]}, {"string"}),
        ({"$ref": "#/$defs/Unit"}, {"string", "integer", "null"}),
        ({"$ref": "#/$defs/a~1b"}, {"boolean"}),
        ({"$ref": "#/$defs/Tree"}, {"string"}),
        ({"anyOf": [{"type": "number"}, {"const": []}]}, {"number", "array"}),
        ({"anyOf": [{"type": "number"}, {}]}, None),
        ({"$ref": "#/$defs/Nobody"}, None),
        ({"$ref": "https://example.org/x"}, None),
        ({}, None),
        (True, None),
        ({"type": 5}, None),
    ],
)
def test_types(schema: Any, types: set[str] | None) -> None:
    parameters = {"type": "object", "properties": {"a": schema}, "$defs": DEFS}
    assert types_of_arguments(parameters) == ({} if types is None else {"a": types})


def test_schemas_that_are_none() -> None:
    assert types_of_arguments({}) == types_of_arguments({"properties": [1]}) == {}


def test_a_long_chain_of_references_is_given_up() -> None:
    chain: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}
    assert types_of_arguments({"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": chain}) == {}


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("5", {"string"}, "5"),
        (" 5\n", {"integer"}, 5),
        ("5", {"number"}, 5),
        ("5.5", {"integer"}, 5.5),
        ("5", {"integer", "string"}, 5),
        ("five", {"integer"}, "five"),
        ("5", {"string", "null"}, "5"),
        ("None", {"string", "null"}, None),
        ("True", {"boolean"}, True),
        ("True", {"string"}, "True"),
        ('"a"', {"string", "null"}, '"a"'),
        ('{"a": 1}', {"string"}, '{"a": 1}'),
        ('{"a": 1}', set(), {"a": 1}),
        ('"a"', set(), '"a"'),
        ("NaN", {"number"}, "NaN"),
        ("", {"array"}, ""),
        ("[" * 100_000, {"array"}, "[" * 100_000),
        ("9" * 5000, {"integer"}, "9" * 5000),
    ],
)
def test_values(text: str, types: set[str], value: Any) -> None:
    assert json.loads(argument_json(text, frozenset(types))) == value
