"""Fields of the OpenAI and vLLM APIs that are known here but not honoured, and those that nobody knows.

A known field is refused unless its value asks for nothing, so that no client believes that its schema or its
tools were used. An unknown field is ignored, and counted; with ``--strict-fields`` it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.anthropic_protocol import CountTokensRequest, MessagesRequest, TextBlock
from server.errors import UnknownParameterError, UnsupportedParameterError, excerpt
from server.protocol import (
    AssistantMessage,
    ChatCompletionRequest,
    CompletionRequest,
    GenerateParameters,
    ModelFields,
    TokenizeChatRequest,
    WireModel,
)
from server.responses_protocol import FunctionTool, ResponsesRequest, TextConfig

# Values besides ``null`` with which a field changes nothing.
_UNSUPPORTED_ANYWHERE: Mapping[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
    "structural_tag": (),
    "early_stopping": (False, "never"),
    "prompt_embeds": (),
    "logits_processors": ([],),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
}
_UNSUPPORTED_BY_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "container": (),
    "mcp_servers": ([],),
    "output_format": (),
}
_UNSUPPORTED: Mapping[type[WireModel], Mapping[str, tuple[Any, ...]]] = {
    ChatCompletionRequest: {
        **_UNSUPPORTED_ANYWHERE,
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "verbosity": ("medium",),
        "web_search_options": (),
        "add_special_tokens": (False,),
        "documents": ([],),
        "mm_processor_kwargs": ({},),
    },
    CompletionRequest: {
        **_UNSUPPORTED_ANYWHERE,
        "suffix": ("",),
    },
    TokenizeChatRequest: {
        "add_special_tokens": (False,),
        "mm_processor_kwargs": ({},),
    },
    GenerateParameters: {
        "typical_p": (),
        "watermark": (False,),
        "best_of": (1,),
        "adapter_id": (),
    },
    AssistantMessage: {"function_call": (), "audio": ()},
    MessagesRequest: {
        **_UNSUPPORTED_BY_MESSAGES,
        "service_tier": ("auto", "standard_only"),
        "inference_geo": (),
    },
    CountTokensRequest: _UNSUPPORTED_BY_MESSAGES,
    ResponsesRequest: {
        "conversation": (),
        "prompt": (),
        "max_tool_calls": (),
        "moderation": (),
        "context_management": ([],),
        "access_programs": (),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
    },
    TextConfig: {"verbosity": ("medium",)},
    FunctionTool: {"defer_loading": (False,), "async": (False,), "allowed_callers": (["direct"],)},
    TextBlock: {"citations": ([],)},
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# Known, and ignored on purpose: they change nothing about the answer.
_IGNORED = frozenset(
    {
        "metadata",
        "store",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "refusal",
        "include_obfuscation",
        "guided_decoding_backend",
        "cache_control",
        "context_management",
        "effort",
    }
)


Path = tuple[str | int, ...]


def check_fields(body: ModelFields, on_unknown: Callable[[Path], None]) -> None:
    """Goes through the fields of a request that the wire models do not list.

    Args:
        on_unknown: gets the path of each field that nobody knows; see ``refuse_unknown``.

    Raises:
        UnsupportedParameterError: naming the first field that asks for something this server does not do.
    """
    _check(body, (), on_unknown)
    _check_within(body, (), on_unknown)


def refuse_unknown(path: Path) -> None:
    """For ``check_fields`` of a strict server. Raises UnknownParameterError."""
    *parents, name = path
    # The name is the client's own text, of any length.
    is_plain = isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None
    param = field_path(path if is_plain else parents) or None
    where = f" in '{field_path(parents)}'" if parents else ""
    raise UnknownParameterError(f"Unknown parameter: {excerpt(str(name))}{where}. Leave it out.", param=param)


def _check_within(model: WireModel, path: Path, on_unknown: Callable[[Path], None]) -> None:
    """Checks the objects inside ``model``, however deep."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, WireModel):
            parts: list[tuple[WireModel, Path]] = [(value, (*path, name))]
        elif isinstance(value, list) and value and isinstance(value[0], WireModel):
            parts = [(part, (*path, name, index)) for index, part in enumerate(value)]
        else:
            continue
        for part, where in parts:
            _check(part, where, on_unknown)
            _check_within(part, where, on_unknown)


def _check(model: WireModel, path: Path, on_unknown: Callable[[Path], None]) -> None:
    if not model.model_extra:
        return
    unsupported = _UNSUPPORTED.get(type(model), {})
    for name, value in model.model_extra.items():
        if name in unsupported:
            allowed = unsupported[name]
            if value is None or value in allowed:
                continue
            param = field_path((*path, name))
            hint = f" other than {_shown(allowed[0])}" if allowed else ""
            raise UnsupportedParameterError(
                f"'{param}'{hint} is not supported by this server. Leave it out.", param=param
            )
        if name not in _IGNORED:
            on_unknown((*path, name))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def field_path(path: Sequence[str | int]) -> str:
    """``("messages", 0, "content")`` -> ``messages[0].content``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text
