"""Answers in which markers set off calls and reasoning from the content: all formats but Harmony's."""

from __future__ import annotations

from server.parsing.argument_types import ArgumentTypes
from server.parsing.call_syntax import CallSink
from server.parsing.emitter import Emitter
from server.parsing.formats import ReasoningFormat, ToolFormat
from server.parsing.text_input import Markers, Step, TextInput


class MarkupParser:
    """Reads one answer.

    What does not keep to the format ends like this:

    - A call begins with its name. If the text ends in it, or its JSON breaks, it is a call with the arguments
      that it has so far.
    - What looks like a call but has no name is content, without markers. It is not searched for calls
      again, so that nothing is read more than twice.
    - A marker that ends what has not begun is left out. Reasoning that does not end is reasoning.
    """

    def __init__(
        self,
        tools: ToolFormat | None,
        reasoning: ReasoningFormat | None,
        tool_names: frozenset[str],
        *,
        is_reasoning: bool,
        argument_types: ArgumentTypes | None = None,
    ) -> None:
        """``is_reasoning``: the prompt has opened the reasoning already."""
        self._tools = tools
        self._reasoning = reasoning
        self._tool_names = tool_names
        self._argument_types = argument_types
        self._is_reasoning = is_reasoning
        self._num_rejected = 0  # letters at the beginning of the text in which no call is looked for again
        texts = (*(tools.markers if tools else ()), *(reasoning.markers if reasoning else ()))
        self._markers = Markers(*texts) if texts else None
        self._thinking = Markers(*reasoning.markers) if reasoning else None

    def parse(self, text: TextInput, out: Emitter) -> Step[None]:
        if self._is_reasoning:
            yield from self._think(text, out)
        tools, reasoning = self._tools, self._reasoning
        while True:
            if tools is not None and tools.is_bare and text.offset >= self._num_rejected:
                yield from self._calls(text, out, tools, self._tool_names)
            if self._markers is None:
                yield from text.run_to_end(out.content)
                return
            marker = yield from text.until(self._markers, out.content)
            if marker is None:
                return
            if reasoning is not None and marker == reasoning.begin:
                yield from self._think(text, out)
            elif tools is not None and marker in tools.begins and text.offset > self._num_rejected:
                yield from self._calls(text, out, tools, None)

    def _think(self, text: TextInput, out: Emitter) -> Step[None]:
        assert self._reasoning is not None
        assert self._thinking is not None
        out.begin_reasoning()
        while (marker := (yield from text.until(self._thinking, out.reasoning))) is not None:
            # A model may open what its prompt has opened already.
            if marker == self._reasoning.end:
                out.end_reasoning()
                return

    def _calls(
        self, text: TextInput, out: Emitter, tools: ToolFormat, names: frozenset[str] | None
    ) -> Step[None]:
        while True:
            text.record()
            call = CallSink(out, names, text.stop_recording, self._argument_types)
            yield from tools.syntax.read(text, call)
            if not call.has_begun:
                self._num_rejected = text.offset
                text.put_back()
                return
            call.end()
            goes_on = yield from tools.syntax.goes_on(text)
            if (yield from text.takes_any(tools.ends)) or not goes_on:
                return
