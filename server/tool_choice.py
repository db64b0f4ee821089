"""Which tools an answer may, must or must not call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.errors import InvalidRequestError, excerpt
from server.parsing.argument_types import ArgumentTypes, types_of_arguments
from server.protocol import ChatPromptFields, NamedToolChoice


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The tools of one request.

    Attributes:
        tools: as the request has them, in OpenAI's form; those that may not be called are left out.
        is_required: the answer must be a call.
        max_calls: None: as many as the model likes.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    is_required: bool = False
    max_calls: int | None = None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.tools)

    @property
    def argument_types(self) -> ArgumentTypes:
        """The types of the tools' arguments, as far as their schemas tell."""
        functions = [tool["function"] for tool in self.tools]
        return {each["name"]: types_of_arguments(each.get("parameters") or {}) for each in functions}


def tool_choice(wire: ChatPromptFields) -> ToolChoice:
    """What a request says about tools.

    Raises:
        InvalidRequestError: it wants a tool that it does not have, or two of one name.
    """
    tools = tuple(tool.model_dump(exclude_unset=True) for tool in wire.tools or ())
    names: set[str] = set()
    for index, tool in enumerate(tools):
        name = tool["function"]["name"]
        if name in names:
            raise InvalidRequestError(
                f"Two tools have the name {excerpt(name)}.",
                param=f"tools[{index}].function.name",
                code="invalid_value",
            )
        names.add(name)
    choice = wire.tool_choice or "auto"
    max_calls = 1 if wire.parallel_tool_calls is False else None
    if choice == "none":
        return ToolChoice()
    if isinstance(choice, NamedToolChoice):
        wanted = choice.function.name
        if wanted not in names:
            raise InvalidRequestError(
                f"'tool_choice' names {excerpt(wanted)}, which is not among 'tools'.",
                param="tool_choice",
                code="invalid_value",
            )
        tools = tuple(tool for tool in tools if tool["function"]["name"] == wanted)
        return ToolChoice(tools, is_required=True, max_calls=1)
    if choice == "required" and not tools:
        raise InvalidRequestError(
            "'tool_choice' is 'required', but there are no 'tools'.",
            param="tool_choice",
            code="invalid_value",
        )
    return ToolChoice(tools, is_required=choice == "required", max_calls=max_calls)
