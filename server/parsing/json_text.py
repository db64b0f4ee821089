"""JSON values inside of other text: passed on as they stand, letter by letter, never built up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from server.parsing.text_input import Markers, Step, TextInput

_PLAIN = re.compile(r'[^"\\]*')
_SCALAR = re.compile(r"[\w.+-]*")


class JsonText:
    """Finds where a JSON value ends, by its brackets and strings; what it is made of is not checked."""

    def __init__(self, ends: Sequence[str] = ()) -> None:
        """``ends`` are markers that outside of strings end any value, complete or not; without brackets."""
        self._structure = Markers(*'"{}[]', *ends)
        self._ends = frozenset(ends)

    def value(self, text: TextInput, emit: Callable[[str], None]) -> Step[bool]:
        """Passes on one value. False if the text, or one of the ends, came first."""
        if (yield from text.ahead()) not in ("{", "[", '"'):
            scalar = yield from text.word(_SCALAR)
            emit(scalar)
            return bool(scalar)
        depth = 0
        while True:
            found = yield from text.until(self._structure, emit)
            if found is None or found in self._ends:
                return False
            emit(found)
            if found == '"':
                if not (yield from string_rest(text, emit)):
                    return False
            elif found in "{[":
                depth += 1
            else:
                depth -= 1
            if depth <= 0:
                return True


def string_rest(text: TextInput, emit: Callable[[str], None]) -> Step[bool]:
    """Passes on a string after its first quote. False if the text ends before the string."""
    while True:
        yield from text.run(_PLAIN, emit)
        letter = yield from text.letter()
        emit(letter)
        if letter == "\\":
            emit((yield from text.letter()))
        else:  # the quote, or nothing at the end of the text
            return letter == '"'


def decoded_string(literal: str) -> str:
    """The text that a JSON string stands for; of a broken one, what is between the quotes."""
    try:
        value = json.loads(literal, strict=False)
    except ValueError:
        return literal.strip('"')
    # Half a surrogate pair is no text that could be sent on.
    return str(value).encode("utf-8", "replace").decode()
