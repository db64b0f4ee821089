"""Which formats a model writes: its chat template shows what earlier answers look like."""

from __future__ import annotations

from server.parsing.formats import (
    DEEPSEEK,
    DEEPSEEK_BLOCKS,
    GLM45,
    HARMONY,
    HARMONY_REASONING,
    HERMES,
    LLAMA3_JSON,
    MINIMAX_M2,
    MISTRAL,
    MISTRAL_NAMED,
    PYTHONIC,
    PYTHONIC_MARKED,
    QWEN3_CODER,
    REASONING_FORMATS,
    ReasoningFormat,
    ToolFormat,
)

_XML_FORMATS = (
    (QWEN3_CODER, ("<tool_call>", "<function=", "<parameter=")),
    (GLM45, ("<tool_call>", "<arg_key>", "<arg_value>")),
    (MINIMAX_M2, ("<minimax:tool_call>", "<invoke name=", "<parameter name=")),
)
# Formats that look like others but have tags inside that no parser here reads.
_UNKNOWN_TAGS = ("<function=", "<arg_key>", "<parameter=", "<parameter name=", "<invoke")


def tool_format_of(template: str) -> ToolFormat | None:
    """The format of the calls that a template writes, as Jinja source; None if it is not known."""
    if _is_harmony(template):
        return HARMONY
    if "<｜tool▁call▁begin｜>" in template:
        return DEEPSEEK_BLOCKS if "```json" in template else DEEPSEEK
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    for format_, tags in _XML_FORMATS:
        if all(tag in template for tag in tags):
            return format_
    if any(tag in template for tag in _UNKNOWN_TAGS):
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
