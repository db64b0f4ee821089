"""What a parsed answer is made of, piece by piece, and the whole that the pieces make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins: its name is known.

    Attributes:
        index: calls of one answer are counted from 0.
        id: random, and no part of what the model wrote, so that comparing deltas leaves it out.
    """

    index: int
    name: str
    id: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """No more arguments come for this call."""

    index: int


Delta = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments | ToolCallEnd


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one of the client's functions; ``arguments`` is JSON text as far as the model kept to it."""

    id: str = field(compare=False)
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """An answer taken apart. Content and reasoning are None if there was none of them."""

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


def collected(deltas: Iterable[Delta]) -> ParsedAnswer:
    """The answer that deltas make when put together."""
    content: list[str] = []
    reasoning: list[str] = []
    starts: list[ToolCallStart] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        match delta:
            case ContentDelta(text):
                content.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case ToolCallStart():
                starts.append(delta)
                arguments.append([])
            case ToolCallArguments(index, text):
                arguments[index].append(text)
            case ToolCallEnd():
                pass
    return ParsedAnswer(
        "".join(content) or None,
        "".join(reasoning) or None,
        tuple(
            ToolCall(start.id, start.name, "".join(pieces))
            for start, pieces in zip(starts, arguments, strict=True)
        ),
    )
