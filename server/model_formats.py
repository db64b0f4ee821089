"""How the served model writes calls of tools and reasoning: as its chat template or the operator says."""

from __future__ import annotations

from dataclasses import dataclass

from server.chat_template import ChatTemplate
from server.parsing.detection import reasoning_format_of, tool_format_of
from server.parsing.formats import AUTO, JSON, REASONING_FORMATS, TOOL_FORMATS, ReasoningFormat, ToolFormat


@dataclass(frozen=True, slots=True)
class ModelFormats:
    """
    Attributes:
        tools: None: calls are not looked for.
        reasoning: None: the model does not think aloud, or its thoughts are left in the content.
        template_takes_tools: the chat template tells the model of the tools. If not, a prompt of ours does,
            and writes calls and their results out as plain messages.
    """

    tools: ToolFormat | None = JSON
    reasoning: ReasoningFormat | None = None
    template_takes_tools: bool = False


def model_formats(
    template: ChatTemplate | None, tool_parser: str = AUTO, reasoning_parser: str = AUTO
) -> ModelFormats:
    """The formats of a model. With ``auto``, a template that writes calls in a way that no parser reads is
    used as if it knew nothing of tools, so that the model is told a way that can be read.

    Args:
        template: None if the model has none: then it takes no chats.
        tool_parser: one of ``formats.TOOL_PARSERS``.
        reasoning_parser: one of ``formats.REASONING_PARSERS``.
    """
    takes_tools = template is not None and template.takes_tools
    if tool_parser == AUTO:
        tools = tool_format_of(template.source_with_tools) if takes_tools and template is not None else None
        takes_tools = tools is not None
        tools = tools or JSON
    else:
        tools = TOOL_FORMATS.get(tool_parser)
    if reasoning_parser == AUTO:
        reasoning = None if template is None else reasoning_format_of(template.source)
    else:
        reasoning = REASONING_FORMATS.get(reasoning_parser)
    return ModelFormats(tools, reasoning, takes_tools)
