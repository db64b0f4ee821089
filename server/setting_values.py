"""The text of one setting, from a flag or a variable, as its value. ValueError says what is taken instead."""

from __future__ import annotations

import re
from collections.abc import Callable

_BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str) -> int:
    """``512MiB``, ``2G``, ``1500000`` -> a number of bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _BYTE_UNITS:
        raise ValueError(f"{text!r} is not a size such as 512MiB or 2GiB")
    return int(float(match[1]) * _BYTE_UNITS[match[2]])


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Of a whole number within these limits, which belong to it."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
        if value < minimum or (maximum is not None and value > maximum):
            limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise ValueError(f"{value} is out of range: it must be {limits}")
        return value

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    """Of one of these words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def size(text: str) -> int:
    """A number of bytes, one at least."""
    value = parse_bytes(text)
    if value < 1:
        raise ValueError("it must be at least one byte")
    return value


def share(text: str) -> float:
    """A part of a whole, which is 1."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{text} is out of range: it must be above 0 and at most 1")
    return value


def names(text: str) -> tuple[str, ...]:
    """``a, b``: one name at least."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise ValueError("it needs at least one name")
    return found


def switch(text: str) -> bool:
    """``on`` or ``off``; a flag of it needs no value to be on."""
    return one_of("on", "off")(text) == "on"


def metric_prefix(text: str) -> str:
    """With or without the colon that follows it in a metric's name."""
    prefix = text.removesuffix(":")
    if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", prefix):
        raise ValueError(f"{text!r} is not a metric prefix: letters, digits and underscores only")
    return prefix
