"""How many characters the shortest text that a regex matches has: a lower bound."""

from __future__ import annotations

import re

# After a backslash: what matches no character, classes and characters with braces or digits.
_EMPTY = frozenset("bBAzZ")
_ESCAPE = re.compile(r"[pPxuU]\{[^}]*\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[pP].|.", re.DOTALL)
_GROUP = re.compile(r"\?(?:P?<[A-Za-z_][^>]*>|[a-wyzA-Z-]*:)")
_REPETITION = re.compile(r"[*+?]|\{\s*(\d*)\s*(?:,\s*\d*\s*)?\}")


class _UnknownError(Exception):
    """Something that this does not understand."""


def shortest_match(regex: str) -> int:
    """Characters of the shortest text that matches, or fewer; 0 where the syntax is not known.

    Raises:
        RecursionError: groups are nested too deeply.
    """
    try:
        length, end = _alternatives(regex, 0)
    except (_UnknownError, IndexError):
        return 0
    return length if end == len(regex) else 0


def _alternatives(regex: str, place: int) -> tuple[int, int]:
    """Their shortest, and the place behind them: of a bracket, or the end."""
    shortest, place = _sequence(regex, place)
    while place < len(regex) and regex[place] == "|":
        length, place = _sequence(regex, place + 1)
        shortest = min(shortest, length)
    return shortest, place


def _sequence(regex: str, place: int) -> tuple[int, int]:
    total = 0
    while place < len(regex) and regex[place] not in "|)":
        length, place = _atom(regex, place)
        is_repeated = False
        while found := _REPETITION.match(regex, place):
            # Behind another one, ? makes it lazy.
            if not (found[0] == "?" and is_repeated):
                length *= _least_times(found)
            is_repeated = found[0] != "?" or not is_repeated
            place = found.end()
        total += length
    return total, place


def _least_times(repetition: re.Match[str]) -> int:
    if repetition[0] == "+":
        return 1
    digits = repetition[1]
    # Beyond any answer, and Python refuses to read more than 4,300 digits.
    return int(digits[:20]) if digits else 0


def _atom(regex: str, place: int) -> tuple[int, int]:
    match regex[place]:
        case "(":
            return _group(regex, place + 1)
        case "[":
            return 1, _behind_class(regex, place + 1)
        case "\\":
            found = _ESCAPE.match(regex, place + 1)
            if found is None:
                raise _UnknownError
            return int(found[0] not in _EMPTY), found.end()
        case "^" | "$":
            return 0, place + 1
        case _:
            return 1, place + 1


def _group(regex: str, place: int) -> tuple[int, int]:
    if regex[place] == "?":
        found = _GROUP.match(regex, place)
        if found is None:  # conditions on what is around, or that white space means nothing
            raise _UnknownError
        place = found.end()
    length, place = _alternatives(regex, place)
    if regex[place] != ")":
        raise _UnknownError
    return length, place + 1


def _behind_class(regex: str, place: int) -> int:
    if regex[place] == "^":
        place += 1
    is_first, depth = True, 1
    while depth:
        letter = regex[place]
        if letter == "\\":
            place += 1
        elif letter == "[":
            depth += 1
        elif letter == "]" and not is_first:
            depth -= 1
        is_first = False
        place += 1
    return place
