"""Text that arrives in pieces, for parsers written as if it were all there.

A parser is a generator. It yields where the text so far does not decide what comes next, and is resumed when
there is more text, or none will come any more. So each step below gives the same result however the text was
cut; nothing in here may look at where a piece ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")

# ``yield from`` it to get the value.
Step = Generator[None, None, T]


class Markers:
    """Strings to look for in a text. None of them lies inside another one."""

    def __init__(self, *texts: str) -> None:
        """Raises ValueError if one is empty or lies inside another, or if there is none."""
        if not texts or any(a in b for a in texts for b in texts if a is not b):
            raise ValueError("markers must not be empty, equal or inside one another")
        self.texts = texts
        self.pattern = re.compile("|".join(map(re.escape, texts)))
        self._beginnings = {text[:length] for text in texts for length in range(1, len(text))}
        self._first_letters = frozenset(text[0] for text in texts)
        self._longest_beginning = max(map(len, texts)) - 1

    def num_held(self, text: str, start: int) -> int:
        """Letters at the end of ``text[start:]`` with which a marker may have begun."""
        start = max(start, len(text) - self._longest_beginning)
        for at in range(start, len(text)):
            if text[at] in self._first_letters and text[at:] in self._beginnings:
                return len(text) - at
        return 0


class TextInput:
    """The part of a text that has come and has not been taken yet.

    Attributes:
        is_complete: no more text comes. Set by who feeds it.
        offset: how many letters have been taken.
    """

    __slots__ = ("_at", "_is_recording", "_record", "_text", "is_complete", "offset")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._record: list[str] = []
        self._is_recording = False
        self.is_complete = False
        self.offset = 0

    def feed(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def record(self) -> None:
        """Keeps what is taken from here on, so that it can be put back."""
        self._record = []
        self._is_recording = True

    def stop_recording(self) -> None:
        self._record = []
        self._is_recording = False

    def put_back(self) -> None:
        """Puts back all that was taken since ``record``, and ends the recording."""
        taken = "".join(self._record)
        self._text = taken + self._text[self._at :]
        self._at = 0
        self.offset -= len(taken)
        self.stop_recording()

    def wait(self) -> Step[bool]:
        """Waits for text. False at the end."""
        while self._at == len(self._text):
            if self.is_complete:
                return False
            yield
        return True

    def ahead(self) -> Step[str]:
        """The next letter, which is not taken; nothing at the end."""
        yield from self.wait()
        return self._text[self._at : self._at + 1]

    def letter(self) -> Step[str]:
        """Takes the next letter; nothing at the end."""
        yield from self.wait()
        return self._take(min(self._at + 1, len(self._text)))

    def takes(self, literal: str) -> Step[bool]:
        """Takes ``literal`` if the text goes on with it."""
        while not self._text.startswith(literal, self._at):
            if self.is_complete or not literal.startswith(self._text[self._at :]):
                return False
            yield
        self._take(self._at + len(literal))
        return True

    def takes_any(self, literals: Sequence[str]) -> Step[bool]:
        """Takes one of the literals, none of which begins another one."""
        for literal in literals:
            if (yield from self.takes(literal)):
                return True
        return False

    def run(self, letters: re.Pattern[str], emit: Callable[[str], None]) -> Step[None]:
        """Passes on text as long as it is made of ``letters``, a pattern like ``[a-z]*``."""
        while (yield from self.wait()):
            found = letters.match(self._text, self._at)
            assert found is not None
            end = found.end()
            emit(self._take(end))
            if end < len(self._text):
                return

    def run_to_end(self, emit: Callable[[str], None]) -> Step[None]:
        """Passes on all text."""
        while (yield from self.wait()):
            emit(self._take(len(self._text)))

    def skip(self, letters: re.Pattern[str]) -> Step[None]:
        """Takes text as long as it is made of ``letters``."""
        yield from self.run(letters, _ignore)

    def word(self, letters: re.Pattern[str]) -> Step[str]:
        """Takes and returns text as long as it is made of ``letters``."""
        pieces: list[str] = []
        yield from self.run(letters, pieces.append)
        return "".join(pieces)

    def until(self, markers: Markers, emit: Callable[[str], None]) -> Step[str | None]:
        """Passes on text up to the first marker, takes and returns that; None at the end of the text."""
        while True:
            text = self._text
            found = markers.pattern.search(text, self._at)
            if found is not None:
                emit(self._take(found.start()))
                self._take(found.end())
                return found[0]
            end = len(text) if self.is_complete else len(text) - markers.num_held(text, self._at)
            emit(self._take(end))
            if self.is_complete:
                return None
            yield

    def _take(self, end: int) -> str:
        piece = self._text[self._at : end]
        self._at = end
        self.offset += len(piece)
        if self._is_recording:
            self._record.append(piece)
        return piece


def _ignore(text: str) -> None:
    pass
