"""Which formats a model writes: its chat template shows what earlier answers look like."""

from __future__ import annotations

from server.parsing.formats import (
    DEEPSEEK,
    DEEPSEEK_BLOCKS,
    HARMONY,
    HARMONY_REASONING,
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_NAMED,
    PYTHONIC,
    PYTHONIC_MARKED,
    REASONING_FORMATS,
    ReasoningFormat,
    ToolFormat,
)

# Formats that look like others but have XML inside, which no parser here reads.
_XML_CALLS = ("<function=", "<arg_key>", "<parameter=", "<parameter name=", "<invoke")


def tool_format_of(template: str) -> ToolFormat | None:
    """The format of the calls that a template writes, as Jinja source; None if it is not known."""
    if _is_harmony(template):
        return HARMONY
    if "<｜tool▁call▁begin｜>" in template:
        return DEEPSEEK_BLOCKS if "```json" in template else DEEPSEEK
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if any(each in template for each in _XML_CALLS):
        return None
    if "<tool_call>" in template:
        return HERMES
    if "<|tool_call_start|>" in template:
        return PYTHONIC_MARKED
    if "<|python_start|>" in template:
        return PYTHONIC
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters"' in template):
        return LLAMA3_JSON
    return None


def reasoning_format_of(template: str) -> ReasoningFormat | None:
    """The format of the reasoning that a template writes or cuts off; None if there is none."""
    if _is_harmony(template):
        return HARMONY_REASONING
    for each in REASONING_FORMATS.values():
        if each.end in template and each is not HARMONY_REASONING:
            return each
    return None


def _is_harmony(template: str) -> bool:
    return "<|channel|>" in template and "<|message|>" in template
