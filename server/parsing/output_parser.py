"""The parser of a model's answers: text in, deltas out."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.parsing.argument_types import ArgumentTypes
from server.parsing.deltas import Delta
from server.parsing.emitter import Emitter
from server.parsing.formats import HARMONY, HARMONY_REASONING, JSON, ReasoningFormat, ToolFormat
from server.parsing.harmony import HarmonyParser
from server.parsing.markup import MarkupParser
from server.parsing.text_input import TextInput


class OutputParser:
    """Takes one answer apart while it comes in: content, reasoning, and calls of tools.

    The deltas, put together (``deltas.collected``), do not depend on how the text was cut into pieces. Takes
    time linear in the text and raises nothing, whatever the text is. See ``MarkupParser`` for what becomes of
    text that does not keep to the format.
    """

    def __init__(self, syntax: OutputSyntax) -> None:
        tools, reasoning = syntax.tools, syntax.reasoning
        self._text = TextInput()
        self._out = Emitter(
            (tools or JSON).new_call_id, syntax.max_calls, keeps_reasoning=syntax.keeps_reasoning
        )
        parser: HarmonyParser | MarkupParser
        if tools is HARMONY or reasoning is HARMONY_REASONING:
            parser = HarmonyParser(has_tools=tools is not None)
        else:
            parser = MarkupParser(
                tools,
                reasoning,
                syntax.tool_names,
                is_reasoning=syntax.is_reasoning,
                argument_types=syntax.argument_types,
            )
        self._steps = parser.parse(self._text, self._out)
        self._is_finished = False
        next(self._steps)

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._out.num_calls

    @property
    def is_reasoning(self) -> bool:
        """Whether the model is thinking at the moment."""
        return self._out.is_reasoning

    def push(self, text: str) -> list[Delta]:
        """What the next piece of the answer adds, maybe nothing."""
        self._text.feed(text)
        next(self._steps, None)
        return self._out.take()

    def finish(self) -> list[Delta]:
        """The rest, once no more text comes. Calls that have begun are ended."""
        if self._is_finished:
            return []
        self._is_finished = True
        self._text.is_complete = True
        next(self._steps, None)
        self._out.finish()
        return self._out.take()


@dataclass(frozen=True, slots=True)
class OutputSyntax:
    """In which formats the answers to one call come.

    Attributes:
        tools: None if no calls are expected: then what looks like one is content.
        reasoning: None if the model does not think aloud.
        tool_names: the functions that may be called.
        max_calls: calls after so many are left out; None keeps all.
        is_reasoning: whether the prompt ends inside of the reasoning.
        keeps_reasoning: False leaves the reasoning out of the deltas.
        argument_types: for formats that write strings without quotes.
    """

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    tool_names: frozenset[str] = frozenset()
    max_calls: int | None = None
    is_reasoning: bool = False
    keeps_reasoning: bool = True
    argument_types: ArgumentTypes = field(default_factory=dict)

    @property
    def markers(self) -> frozenset[str]:
        """Markers of the formats; those that are control tokens must be part of the text."""
        if self.tools is HARMONY or self.reasoning is HARMONY_REASONING:
            return frozenset(HARMONY.markers)
        tools = self.tools.markers if self.tools is not None else ()
        return frozenset((*tools, *(self.reasoning.markers if self.reasoning is not None else ())))
