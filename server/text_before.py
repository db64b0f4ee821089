"""Text up to a marker, and text without one, as regexes whose free part llguidance recognizes.

``head[lazy]: /(.|\\n)*/ "<call>"`` says the same, but there llguidance tries each token of the vocabulary at
each step (1.7 ms at 128k tokens). It knows most tokens at once (``GrammarCompiler``'s slices) only where a
regex begins with the repetition of a class that has them.
"""

from __future__ import annotations

from dataclasses import dataclass

_MAX_CHARS = 32
_LETTERS = {ord(letter): f"\\{letter}" for letter in r"\.+*?()|[]{}^$/-&~#"} | {ord("\n"): r"\n"}


@dataclass(frozen=True, slots=True)
class TextBefore:
    """Regexes, as they stand between slashes in Lark.

    Attributes:
        until: text that ends with the marker and has it nowhere else.
        without: text that has it nowhere.
    """

    until: str
    without: str


def text_before(marker: str) -> TextBefore | None:
    """None for markers in which a part of a marker may hide: whose first letter comes again, or long ones."""
    first, rest = marker[0], [letter.translate(_LETTERS) for letter in marker[1:]]
    if not 2 <= len(marker) <= _MAX_CHARS or first in marker[1:] or not _is_plain(marker):
        return None
    start = first.translate(_LETTERS)
    # Behind the first letter: as many of the others as come, but not all; and what shows that they do not.
    some, other = "", ""
    for place in reversed(range(len(rest))):
        letter = rest[place]
        if place < len(rest) - 1:
            some = f"({letter}{some})?"
            other = f"([^{start}{letter}]|{letter}{other})"
        else:
            other = f"[^{start}{letter}]"
    again = f"({some}{start})*"
    free = f"([^{start}]|{start}{again}{other})*"
    return TextBefore(f"{free}{start}{again}{''.join(rest)}", f"{free}({start}{again}{some})?")


def _is_plain(marker: str) -> bool:
    return all(letter == "\n" or (letter.isascii() and letter.isprintable()) for letter in marker)
