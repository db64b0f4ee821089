"""How models write calls of functions, one class a way. Each reads one call at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from server.parsing.argument_types import ArgumentTypes
from server.parsing.emitter import Emitter
from server.parsing.json_text import JsonText, decoded_string, string_rest
from server.parsing.text_input import Step, TextInput

_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[a-z]*")
_BEFORE_JSON = re.compile(r"[\s\[,;]*")
_AFTER_JSON = re.compile(r"[\s\]},;`]*")
_AFTER_NAMED = re.compile(r"[\s`]*")
_NAME = re.compile(r"[^\s\[{(<`\"]*")
_LINE = re.compile(r"[^\n{`<]*")
_SPACE_OR_COMMA = re.compile(r"[\s,]*")
_NAME_KEYS = ("name", "tool_name")
_ARGUMENT_KEYS = ("arguments", "parameters", "args")
# What may stand before the name in an object that no marker has announced as a call.
_HARMLESS_KEYS = ("type", "id")


class CallSink:
    """One call while it is read.

    Attributes:
        has_begun: its name is known, and is one that may be called.
    """

    def __init__(
        self,
        out: Emitter,
        names: frozenset[str] | None,
        on_begin: Callable[[], object],
        types: ArgumentTypes | None = None,
    ) -> None:
        """``names`` are those that may be called; None takes any."""
        self._out = out
        self._types = types or {}
        self.names = names
        self._on_begin = on_begin
        self._early: list[str] = []  # arguments that came before the name
        self._has_arguments = False
        self.has_begun = False

    def begin(self, name: str) -> bool:
        """False if this is no name to be called."""
        name = name.strip()
        if not name or (self.names is not None and name not in self.names):
            return False
        if not self.has_begun:
            self.has_begun = True
            self._on_begin()
            self._out.begin_call(name)
            for text in self._early:
                self._out.arguments(text)
        return True

    def types_of(self, name: str) -> Mapping[str, frozenset[str]]:
        """The types of a function's arguments, as far as they are known."""
        return self._types.get(name, {})

    @property
    def has_arguments(self) -> bool:
        return self._has_arguments

    def arguments(self, text: str) -> None:
        """More of the arguments' JSON text."""
        if not text:
            return
        self._has_arguments = True
        if self.has_begun:
            self._out.arguments(text)
        else:
            self._early.append(text)

    def end(self) -> None:
        """No more comes; a call without arguments has an empty object of them."""
        if not self._has_arguments:
            self._out.arguments("{}")
        self._out.end_call()


class CallSyntax(Protocol):
    """A way to write calls, after what announces them and up to what ends them."""

    def read(self, text: TextInput, call: CallSink) -> Step[None]:
        """Reads one call. If it turns out to be none, ``call`` has not begun; what was taken is lost here."""
        ...

    def goes_on(self, text: TextInput) -> Step[bool]:
        """After a call: takes what separates calls, and says whether another one comes."""
        ...


class JsonCalls:
    """``{"name": ..., "arguments": {...}}``, one or several, in a list or not, in a code block or not.

    ``parameters`` means ``arguments``; the two may come in any order, and inside ``"function": {...}``.
    """

    def __init__(self, ends: Sequence[str] = ()) -> None:
        """``ends`` are markers that end a call even where its JSON is not complete."""
        self._json = JsonText(ends)

    def read(self, text: TextInput, call: CallSink) -> Step[None]:
        yield from text.skip(_BEFORE_JSON)
        if (yield from text.takes("```")):
            yield from text.skip(_WORD)
            yield from text.skip(_BEFORE_JSON)
        if (yield from text.takes("{")):
            yield from self._fields(text, call, may_nest=True)

    def goes_on(self, text: TextInput) -> Step[bool]:
        yield from text.skip(_AFTER_JSON)
        return (yield from text.ahead()) == "{"

    def _fields(self, text: TextInput, call: CallSink, *, may_nest: bool) -> Step[bool]:
        """Reads an object whose brace was taken. False where it breaks off."""
        while True:
            yield from text.skip(_SPACE_OR_COMMA)
            if (yield from text.takes("}")):
                return True
            key = yield from self._string(text)
            yield from text.skip(_SPACE)
            if key is None or not (yield from text.takes(":")):
                return False
            yield from text.skip(_SPACE)
            if key in _NAME_KEYS:
                name = yield from self._string(text)
                if name is None or not call.begin(name):
                    return False
            elif key == "function" and may_nest and (yield from text.takes("{")):
                if not (yield from self._fields(text, call, may_nest=False)):
                    return False
            elif key in _ARGUMENT_KEYS and not call.has_arguments:
                if not (yield from self._arguments(text, call)):
                    return False
            elif call.has_begun or call.names is None or key in _HARMLESS_KEYS:
                if not (yield from self._json.value(text, _ignore)):
                    return False
            else:
                return False

    def _arguments(self, text: TextInput, call: CallSink) -> Step[bool]:
        letter = yield from text.ahead()
        if letter in ("{", "["):
            return (yield from self._json.value(text, call.arguments))
        # Some models write the arguments as JSON inside of a string; null means none.
        pieces: list[str] = []
        is_complete = yield from self._json.value(text, pieces.append)
        value = "".join(pieces)
        if value.startswith('"'):
            value = decoded_string(value)
        call.arguments("" if value == "null" else value)
        return is_complete

    def _string(self, text: TextInput) -> Step[str | None]:
        """Reads a string. None if there is none, or no end of it."""
        if not (yield from text.takes('"')):
            return None
        pieces = ['"']
        if not (yield from string_rest(text, pieces.append)):
            return None
        return decoded_string("".join(pieces))


class MistralCalls:
    """After ``[TOOL_CALLS]``: a list of objects, or in newer models ``NAME[ARGS]{...}``."""

    def __init__(self) -> None:
        self._objects = JsonCalls()
        self._json = JsonText()

    def read(self, text: TextInput, call: CallSink) -> Step[None]:
        yield from text.skip(_SPACE)
        if (yield from text.ahead()) in ("[", "{"):
            yield from self._objects.read(text, call)
            return
        name = yield from text.word(_NAME)
        if (yield from text.takes("[CALL_ID]")):
            yield from text.word(_NAME)
        has_arguments = yield from text.takes("[ARGS]")
        yield from text.skip(_SPACE)
        if (yield from text.ahead()) != "{" and not has_arguments:
            return
        if call.begin(name):
            yield from self._json.value(text, call.arguments)

    def goes_on(self, text: TextInput) -> Step[bool]:
        return (yield from self._objects.goes_on(text))


class DeepSeekCalls:
    """``NAME<sep>{...}``, or in older models ``function<sep>NAME`` and the arguments in a code block."""

    def __init__(self, separator: str, ends: Sequence[str]) -> None:
        self._separator = separator
        self._json = JsonText(ends)

    def read(self, text: TextInput, call: CallSink) -> Step[None]:
        name = yield from text.word(_LINE)
        if not (yield from text.takes(self._separator)):
            return
        yield from text.skip(_SPACE)
        if (yield from text.ahead()) != "{":
            name = yield from text.word(_LINE)
            yield from text.skip(_SPACE)
            if (yield from text.takes("```")):
                yield from text.skip(_WORD)
                yield from text.skip(_SPACE)
        if call.begin(name) and (yield from text.ahead()) == "{":
            yield from self._json.value(text, call.arguments)

    def goes_on(self, text: TextInput) -> Step[bool]:
        yield from text.skip(_AFTER_NAMED)
        return False


def _ignore(text: str) -> None:
    pass
