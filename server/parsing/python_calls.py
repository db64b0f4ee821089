"""Calls written as Python: ``[get_weather(city="Paris", days=3), now()]``. Nothing is evaluated."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

from server.parsing.call_syntax import CallSink
from server.parsing.text_input import Step, TextInput

_SPACE = re.compile(r"\s*")
_IDENTIFIER = re.compile(r"[\w.]*")
_LITERAL = re.compile(r"[\w.+-]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PLAIN = {"'": re.compile(r"[^'\\\"\x00-\x1f]*"), '"': re.compile(r'[^"\\\x00-\x1f]*')}
_CONSTANTS = {
    "True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null",
}  # fmt: skip
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_SAME_ESCAPES = "nrtbf\\/"
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
# Deeper values than any function takes; a bound for the recursion.
_MAX_DEPTH = 32
_MAX_LITERAL_CHARS = 400


class PythonCalls:
    """A list of calls with keyword arguments, whose values are literals. They become JSON as they come.

    Arguments without a keyword are left out.
    """

    def read(self, text: TextInput, call: CallSink) -> Step[None]:
        yield from text.skip(_SPACE)
        if (yield from text.takes("[")):
            yield from text.skip(_SPACE)
        name = yield from text.word(_IDENTIFIER)
        yield from text.skip(_SPACE)
        if not name[:1].isidentifier() or not (yield from text.takes("(")) or not call.begin(name):
            return
        call.arguments("{")
        separator = ""
        while True:
            yield from text.skip(_SPACE)
            if (yield from text.takes(")")):
                break
            if separator and (yield from text.takes(",")):
                continue
            keyword = yield from text.word(_IDENTIFIER)
            yield from text.skip(_SPACE)
            if not (yield from text.takes("=")):
                # An argument without a keyword: which one it is, is not known here.
                if not keyword and not (yield from _value(text, _ignore, _MAX_DEPTH)):
                    return
                yield from text.skip(_LITERAL)
                yield from text.skip(_SPACE)
                if not (yield from text.takes(",")) and (yield from text.ahead()) != ")":
                    return
                continue
            yield from text.skip(_SPACE)
            call.arguments(f"{separator}{json.dumps(keyword)}: ")
            separator = ", "
            if not (yield from _value(text, call.arguments, _MAX_DEPTH)):
                return
        call.arguments("}")

    def goes_on(self, text: TextInput) -> Step[bool]:
        yield from text.skip(_SPACE)
        if (yield from text.takes(",")):
            return True
        yield from text.takes("]")
        return False


def _value(text: TextInput, emit: Callable[[str], None], depth: int) -> Step[bool]:
    """Passes on one literal as JSON. False where it breaks off."""
    letter = yield from text.ahead()
    if letter in ("'", '"'):
        return (yield from _string(text, emit))
    if letter in _CLOSING:
        return (yield from _group(text, emit, depth))
    literal = yield from text.word(_LITERAL)
    emit(_json_literal(literal))
    return bool(literal)


def _group(text: TextInput, emit: Callable[[str], None], depth: int) -> Step[bool]:
    """A list, a tuple, or an object with strings as its keys."""
    opening = yield from text.letter()
    closing = _CLOSING[opening]
    if not depth:
        return False
    emit("{" if opening == "{" else "[")
    separator = ""
    while True:
        yield from text.skip(_SPACE)
        if (yield from text.takes(closing)):
            emit("}" if opening == "{" else "]")
            return True
        if separator and (yield from text.takes(",")):
            continue
        emit(separator)
        separator = ", "
        if opening == "{":
            if (yield from text.ahead()) not in ("'", '"') or not (yield from _string(text, emit)):
                return False
            yield from text.skip(_SPACE)
            if not (yield from text.takes(":")):
                return False
            emit(": ")
            yield from text.skip(_SPACE)
        if not (yield from _value(text, emit, depth - 1)):
            return False


def _string(text: TextInput, emit: Callable[[str], None]) -> Step[bool]:
    """A string as a JSON string. Where the text ends inside of it, so does what is passed on."""
    quote = yield from text.letter()
    emit('"')
    while True:
        yield from text.run(_PLAIN[quote], emit)
        letter = yield from text.letter()
        if not letter:
            return False
        if letter == quote:
            emit('"')
            return True
        if letter == "\\":
            emit((yield from _escape(text)))
        else:  # a double quote among single ones, or a control character such as a line break
            emit(json.dumps(letter)[1:-1])


def _escape(text: TextInput) -> Step[str]:
    """What follows a backslash, as JSON writes it."""
    letter = yield from text.letter()
    if letter and letter in _SAME_ESCAPES:
        return "\\" + letter
    if letter in _HEX_DIGITS:
        digits = ""
        for _ in range(_HEX_DIGITS[letter]):
            digit = yield from text.ahead()
            if digit not in tuple("0123456789abcdefABCDEF"):
                break
            digits += yield from text.letter()
        if len(digits) == _HEX_DIGITS[letter] and int(digits, 16) < 0x110000:
            return json.dumps(chr(int(digits, 16)))[1:-1]
        return "\\\\" + letter + digits
    if letter in ("'", '"'):
        return json.dumps(letter)[1:-1]
    # As in Python: a backslash before any other letter is just a backslash.
    return "" if letter == "\n" else "\\\\" + json.dumps(letter)[1:-1]


def _json_literal(literal: str) -> str:
    """Constants and numbers as JSON writes them; anything else, such as a bare word, becomes a string."""
    if literal in _CONSTANTS:
        return _CONSTANTS[literal]
    if _NUMBER.fullmatch(literal):
        return literal
    if literal and len(literal) <= _MAX_LITERAL_CHARS:
        for number in (int, float):
            try:
                value = number(literal)
            except ValueError:
                continue
            if math.isfinite(value):
                return json.dumps(value)
    return json.dumps(literal) if literal else ""


def _ignore(text: str) -> None:
    pass
