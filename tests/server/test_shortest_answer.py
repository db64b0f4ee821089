"""Lower bounds of what follows a regex or a schema, against Python's own and against texts that do follow."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from server.grammars import Tag, from_grammar, from_json_schema, from_regex, from_tags
from server.shortest_answer import reason_it_cannot_fit
from server.shortest_match import shortest_match

MANY = 10**9
ITEMS: dict[str, Any] = {"type": "array", "minItems": MANY}
# Schemas, and what is named of those that no answer of 1,000 tokens with 10 characters each satisfies.
SCHEMAS: list[tuple[dict[str, Any], str | None]] = [
    (ITEMS, "'minItems' takes more than 1000 tokens"),
    ({"type": "array", "minItems": 1e9}, "'minItems'"),
    ({"type": "array", "minItems": 1000}, None),
    ({"type": "array", "minItems": 1001}, "'minItems'"),
    ({"type": "array", "maxItems": MANY}, None),
    ({"minItems": MANY}, None),  # a number will do
    ({"type": ["null", "array"], "minItems": MANY}, None),
    ({"anyOf": [{"type": "null"}, ITEMS]}, None),
    ({"anyOf": [{"type": "string", "minLength": MANY}, ITEMS]}, "at '/anyOf/0'"),
    ({"allOf": [{"type": "array"}, ITEMS]}, "at '/allOf/1'"),
    ({"type": "object", "properties": {"a": ITEMS}}, None),
    ({"type": "object", "properties": {"a/b": ITEMS}, "required": ["a/b"]}, "at '/properties/a~1b'"),
    ({"type": "object", "minProperties": MANY}, "'minProperties'"),
    ({"type": "object", "required": [str(number) for number in range(1001)]}, "'required'"),
    ({"type": "string", "minLength": 10_000}, None),
    ({"type": "string", "minLength": 10_001}, "'minLength'"),
    ({"type": "string", "pattern": "^[ab]{10001}$"}, "'pattern'"),
    ({"const": "x" * 10_001}, "'const'"),
    ({"enum": ["x" * 10_001, "y"]}, None),
    ({"enum": ["x" * 10_001]}, "'enum'"),
    ({"$defs": {"a": ITEMS}, "$ref": "#/$defs/a"}, "'minItems' at '/$defs/a'"),
    ({"$defs": {"a": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
     None),
    ({"type": "array", "minItems": 100, "items": {"type": "array", "minItems": 11}}, "'minItems'"),
    ({"type": "array", "minItems": 2, "items": {"type": "string", "minLength": MANY}}, "at '/items'"),
    ({"type": "array", "minItems": 2, "prefixItems": [{}, ITEMS]}, "at '/prefixItems/1'"),
    ({"type": "array", "minItems": 1, "prefixItems": [{}, ITEMS]}, None),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "reason"), SCHEMAS)
def test_schemas(schema: dict[str, Any], reason: str | None) -> None:
    said = reason_it_cannot_fit(from_json_schema(schema), 1000, 10)
    assert (said is None) if reason is None else (said is not None and reason in said), said


def test_schemas_and_regexes_in_grammars() -> None:
    tag = Tag("<a>", ITEMS, "</a>")
    lark = f'start: "x" | %json {json.dumps(ITEMS)}'
    for grammar in (from_tags([tag], ["<a>"], frozenset()), from_grammar(lark), from_regex("(a/b){5001}")):
        assert "takes more than 1000 tokens" in str(reason_it_cannot_fit(grammar, 1000, 10)), grammar
    for grammar in (from_grammar('start: "%json {" /a{99999}/'), from_regex("(a/b){3333}")):
        assert reason_it_cannot_fit(grammar, 1000, 10) is None


def test_a_schema_that_refers_to_itself_everywhere_is_no_work() -> None:
    names = [f"d{number}" for number in range(200)]
    schema = {
        "$defs": {
            name: {
                "type": "array",
                "minItems": 2,
                "items": {"anyOf": [{"$ref": f"#/$defs/{n}"} for n in names]},
            }
            for name in names[:20]
        },
        "$ref": "#/$defs/d0",
    }
    assert reason_it_cannot_fit(from_json_schema(schema), 1000, 10) is None


@pytest.mark.parametrize(
    ("regex", "length"),
    [("(?i:ab)", 2), (r"\p{L}{3}", 3), (r"\x{61}b", 2), ("[[:alpha:]]{4}", 4), ("[]a]{2}", 2), ("a{2}{3}", 6),
     ("a{99999999999999999999999}", 99999999999999999999), ("(?=a)b", 0), ("(", 0), ("[", 0), ("a)", 0)],
)  # fmt: skip
def test_regexes_in_rusts_syntax(regex: str, length: int) -> None:
    assert shortest_match(regex) == length


def test_random_regexes() -> None:
    """Python's parser knows the width of what it has parsed."""
    rng = random.Random(0)

    def made(depth: int) -> str:
        if depth == 0:
            return rng.choice(["a", r"\.", r"\d", "[a-c]", "[^]x]", ".", "^", r"\b"])
        kind = rng.randrange(5)
        if kind < 2:
            return made(depth - 1) + made(depth - 1)
        if kind == 2:
            return f"({rng.choice(['', '?:', '?P<n>'])}{made(depth - 1)}|{made(depth - 1)})".replace(
                "n", f"n{depth}"
            )
        return f"(?:{made(depth - 1)})" + rng.choice(["*", "+", "?", "{3}", "{2,}", "{2,5}", "+?", "{2,3}?"])

    num_compared = 0
    for _ in range(2000):
        regex = made(rng.randrange(6))
        try:
            shortest = re._parser.parse(regex).getwidth()[0]  # type: ignore[attr-defined]
        except re.error:  # a name twice
            continue
        assert shortest_match(regex) == shortest, regex
        num_compared += 1
    assert num_compared > 1000
