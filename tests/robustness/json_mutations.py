"""Bodies that are almost right: a valid one with a few places changed, and some of its bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any


class Raw(str):
    """Stands in a value for text that goes into the JSON as it is, valid or not."""

    __slots__ = ()


_PLAIN = (None, True, False, 0, 1, -1, 1.5, "", "x", [], {}, [[]], [None], {"": ""})
_LARGE = (2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
_FLOATS = (0.0, 1e-320, 1e308, -1e308, 0.1 + 0.2, 1 + 1e-16)
_RAW = (
    "NaN", "Infinity", "-Infinity", "-0.0", "-0", "1e999", "01", "1.", "+1", "0x1", "tru", "9" * 400,
    "1" + "0" * 5000, "1e-99999", "undefined", "'x'", '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\\x"',
    '"\\u12"', '"a\nb"', '"\\ud83d\\ude00"', '"\x00"', '"',
)  # fmt: skip
_CHARACTERS = "ab \n\t\x00\x1b\u202e\ufffe\U0001f642é<|_'\"\\{}[]%$"
_TEXTS = (
    "<|im_start|>", "<|im_end|>", "<tool_call>", "{{ 1 }}", "{% for %}", "../../x", "http://169.254.169.254/",
    "null", "auto", "required", "none", "text", "user",
)  # fmt: skip
_TYPES = ("text", "function", "object", "array", "x", None, 1, "json_schema")
_BYTES = (
    b"\x00", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b",", b"{", b"]", b":", b"\\",
    b"\n", b"\xf4\x90\x80\x80",
)  # fmt: skip
_VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda chance: copy.deepcopy(chance.choice(_PLAIN)),
    lambda chance: chance.choice(_LARGE),
    lambda chance: chance.choice(_FLOATS),
    lambda chance: Raw(chance.choice(_RAW)),
    lambda chance: "".join(chance.choices(_CHARACTERS, k=chance.randrange(60))),
    lambda chance: chance.choice("axé ") * chance.choice((64, 65, 1025, 5000)),
    lambda chance: chance.choice(_TEXTS),
    lambda chance: [chance.randrange(-2, 50_000) for _ in range(chance.choice((0, 1, 3, 300)))],
    lambda chance: {"type": chance.choice(_TYPES)},
    lambda chance: Raw("[" * (depth := chance.choice((3, 150, 199, 201, 3000))) + "]" * depth),
    lambda chance: Raw('{"a":' * (depth := chance.choice((3, 150, 201, 2000))) + "1" + "}" * depth),
    lambda chance: [chance.choice(("a", 1))] * chance.choice((17, 129, 1025)),
    lambda chance: {f"k{i}": i for i in range(chance.choice((17, 301)))},
)
_NAMES = (
    "", "x", "type", "role", "content", "n", "stream", "$ref", "__class__", "\x00", "a" * 300, "\u202e",
    "model",
)  # fmt: skip


def mutated(body: dict[str, Any], chance: random.Random) -> bytes:
    """One to four changes of the value, then, of one in three, changes of its bytes."""
    value: Any = copy.deepcopy(body)
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4))):
        places = list(_places(value))
        if not places:
            break
        _change(*chance.choice(places), value, chance)
    text = "".join(_written(value)).encode("utf-8", "surrogatepass")
    return changed_bytes(text, chance) if chance.random() < 0.33 else text


def changed_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flipped, cut, doubled, dropped or foreign bytes at one to three places."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(changed) + 1)
        size = chance.choice((1, 1, 2, 8, 64))
        match chance.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                changed[at:at] = changed[max(0, at - size) : at]
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at:at] = chance.choice(_BYTES)
            case _:
                changed[at : at + size] = chance.randbytes(size)
    return bytes(changed)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _change(container: Any, key: Any, root: Any, chance: random.Random) -> None:
    match chance.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[chance.choice(_NAMES)] = container.pop(key)
        case 2 if isinstance(container, dict):
            container[chance.choice(_NAMES)] = chance.choice(_VALUES)(chance)
        case 1 | 2:
            container.insert(key, copy.deepcopy(container[key]))
        case 3:  # something from elsewhere in the body
            other, place = chance.choice(list(_places(root)))
            container[key] = copy.deepcopy(other[place])
        case 4:
            container[key] = chance.choice([[container[key]], {"type": container[key]}, str(container[key])])
        case _:
            container[key] = chance.choice(_VALUES)(chance)


def _written(value: Any) -> Iterator[str]:
    if isinstance(value, Raw):
        yield str(value)
    elif isinstance(value, dict):
        yield "{"
        for number, (name, item) in enumerate(value.items()):
            yield f"{',' if number else ''}{json.dumps(name)}:"
            yield from _written(item)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for number, item in enumerate(value):
            yield "," if number else ""
            yield from _written(item)
        yield "]"
    else:
        yield json.dumps(value, ensure_ascii=False)
