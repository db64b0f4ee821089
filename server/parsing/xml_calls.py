"""Calls written with tags, one for each argument: those of Qwen3-Coder, GLM-4.5 and MiniMax-M2."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.parsing.argument_types import argument_json
from server.parsing.call_syntax import CallSink
from server.parsing.text_input import Markers, Step, TextInput

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[\w.:-]*")
_ARGUMENT_NAME = re.compile(r"[^<>\"\n]*")
_TEXT_ONLY = frozenset({"string"})


@dataclass(frozen=True)
class CallTags:
    """What is written around the name of a function, and the names and values of its arguments.

    Attributes:
        after_name: nothing if a line break or a tag ends the name.
        before_value: a tag of its own, maybe on the next line; nothing if ``after_argument`` is followed by
            the value.
        ends: what ends a call, even in the middle of a value; all but the first only by mistake there.
        has_lines: values have lines of their own: a line break at both ends is not theirs.
        announces_itself: models leave out what should announce a call and begin with ``before_name``, which
            is a marker then, and may have been taken.
    """

    before_name: str
    after_name: str
    before_argument: str
    after_argument: str
    before_value: str
    after_value: str
    ends: Sequence[str]
    has_lines: bool = False
    announces_itself: bool = False


class XmlCalls:
    """Each argument becomes JSON as its type in the function's schema says (``argument_json``).

    Strings are passed on as they come, others when they are complete. Text between the tags is left out, and
    so is an argument that was given before.
    """

    def __init__(self, tags: CallTags, all_end: str) -> None:
        """``all_end`` is the marker after all calls, which ends also a value that has no end of its own."""
        self._tags = tags
        self._ends = frozenset((*tags.ends, all_end))
        self._parts = Markers(tags.before_argument, *self._ends)
        self._value_ends = Markers(tags.after_value, all_end)

    def read(self, text: TextInput, call: CallSink) -> Step[None]:
        tags = self._tags
        yield from text.skip(_SPACE)
        if not (yield from text.takes(tags.before_name)) and not tags.announces_itself:
            return
        name = yield from text.word(_NAME)
        if tags.after_name:
            if not (yield from text.takes(tags.after_name)):
                return
        else:
            yield from text.skip(_SPACE)
            if (yield from text.ahead()) != "<":
                return
        if call.begin(name) and (yield from self._arguments(text, call, name)):
            call.arguments("}")

    def goes_on(self, text: TextInput) -> Step[bool]:
        yield from text.skip(_SPACE)
        return (yield from text.ahead()) == "<"

    def _arguments(self, text: TextInput, call: CallSink, function: str) -> Step[bool]:
        """False if the text ends before the call does, or if there are none."""
        tags, types = self._tags, call.types_of(function)
        given: set[str] = set()
        while (found := (yield from text.until(self._parts, _ignore))) == tags.before_argument:
            name = yield from text.word(_ARGUMENT_NAME)
            if not (yield from text.takes(tags.after_argument)):
                continue
            if tags.before_value:
                yield from text.skip(_SPACE)
                if not (yield from text.takes(tags.before_value)):
                    continue
            begin = f"{', ' if given else '{'}{json.dumps(name, ensure_ascii=False)}: "
            known = types.get(name, frozenset())
            if name in given:
                end = yield from self._value(text, _ignore)
            elif known == _TEXT_ONLY:
                call.arguments(f'{begin}"')
                end = yield from self._value(text, lambda piece: call.arguments(_escaped(piece)))
                call.arguments("" if end is None else '"')
            else:
                pieces: list[str] = []
                end = yield from self._value(text, pieces.append)
                call.arguments("" if end is None else begin + argument_json("".join(pieces), known))
            if end is None:
                return False
            given.add(name)
            if end in self._ends:
                return True
        return found is not None and bool(given)

    def _value(self, text: TextInput, emit: Callable[[str], None]) -> Step[str | None]:
        """Passes on a value, and returns what ended it; None if the text did."""
        if not self._tags.has_lines:
            return (yield from text.until(self._value_ends, emit))
        yield from text.takes("\n")
        return (yield from text.until(self._value_ends, _WithoutLastBreak(emit).add))


class _WithoutLastBreak:
    """Passes on text but for a line break at its end."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._break = ""

    def add(self, piece: str) -> None:
        piece = self._break + piece
        self._break = "\n" if piece.endswith("\n") else ""
        self._emit(piece.removesuffix(self._break))


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _ignore(text: str) -> None:
    pass
