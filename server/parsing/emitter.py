"""Where parsers put what they find: joined, numbered, and without the white space around markup."""

from __future__ import annotations

from collections.abc import Callable

from server.parsing.deltas import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

_SPACE = " \t\r\n"


class Emitter:
    """Collects deltas between two looks at them.

    White space between content and markup (a call, or reasoning) belongs to the markup and is left out; so is
    that at both ends of a piece of reasoning. Content without markup is not changed at all.

    Attributes:
        num_calls: calls that have begun.
        is_reasoning: whether the model is thinking at the moment.
    """

    def __init__(
        self, new_call_id: Callable[[], str], max_calls: int | None = None, *, keeps_reasoning: bool = True
    ) -> None:
        """Calls after the first ``max_calls`` are left out, and without ``keeps_reasoning`` all reasoning."""
        self._new_call_id = new_call_id
        self._max_calls = max_calls
        self._keeps_reasoning = keeps_reasoning
        self._deltas: list[Delta] = []
        self._kind: type[ContentDelta | ReasoningDelta | ToolCallArguments] = ContentDelta
        self._pieces: list[str] = []
        self._space: list[str] = []  # at the end of the text so far; whether it counts is open
        self._is_after_markup = False
        self._is_in_call = False
        self.num_calls = 0
        self.is_reasoning = False

    def content(self, text: str) -> None:
        self._text(ContentDelta, text)

    def reasoning(self, text: str) -> None:
        if self._keeps_reasoning:
            self._text(ReasoningDelta, text)

    def begin_reasoning(self) -> None:
        self._border()
        self.is_reasoning = True

    def end_reasoning(self) -> None:
        self._border()
        self.is_reasoning = False

    def begin_call(self, name: str) -> None:
        self._border()
        self._is_in_call = self._max_calls is None or self.num_calls < self._max_calls
        if self._is_in_call:
            self._flush()
            self._deltas.append(ToolCallStart(self.num_calls, name, self._new_call_id()))
            self.num_calls += 1

    def arguments(self, text: str) -> None:
        if text and self._is_in_call:
            self._add(ToolCallArguments, text)

    def end_call(self) -> None:
        self._border()
        if self._is_in_call:
            self._flush()
            self._deltas.append(ToolCallEnd(self.num_calls - 1))
            self._is_in_call = False

    def finish(self) -> None:
        """No more text comes: the white space at the end belongs to the content."""
        if not self._is_after_markup and not self.is_reasoning and self._space:
            self._add(ContentDelta, "".join(self._space))
        self._space.clear()

    def take(self) -> list[Delta]:
        """The deltas since the last call, neighbours of one kind joined."""
        self._flush()
        taken, self._deltas = self._deltas, []
        return taken

    def _text(self, kind: type[ContentDelta | ReasoningDelta], text: str) -> None:
        if self._is_after_markup:
            text = text.lstrip(_SPACE)
        body = text.rstrip(_SPACE)
        if not body:
            if text:
                self._space.append(text)
            return
        self._is_after_markup = False
        space = text[len(body) :]
        if self._space:
            body = "".join((*self._space, body))
            self._space.clear()
        if space:
            self._space.append(space)
        self._add(kind, body)

    def _border(self) -> None:
        self._space.clear()
        self._is_after_markup = True

    def _add(self, kind: type[ContentDelta | ReasoningDelta | ToolCallArguments], text: str) -> None:
        if self._kind is not kind:
            self._flush()
            self._kind = kind
        self._pieces.append(text)

    def _flush(self) -> None:
        if not self._pieces:
            return
        text = "".join(self._pieces)
        self._pieces.clear()
        if self._kind is ToolCallArguments:
            self._deltas.append(ToolCallArguments(self.num_calls - 1, text))
        elif self._kind is ContentDelta:
            self._deltas.append(ContentDelta(text))
        else:
            self._deltas.append(ReasoningDelta(text))
