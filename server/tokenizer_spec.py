"""What a model's files say about its tokenizer, whichever format they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import tokenizers


class TokenizerError(Exception):
    """The tokenizer cannot be loaded; the message says why and what would work."""


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """A ready tokenizer and what goes with it.

    Attributes:
        backend: encodes text. Its added tokens are the control tokens (``special``) and those of the user.
        eos_token_ids: tokens that end a generation.
        named_special_tokens: what chat templates see, such as ``{"bos_token": "<s>"}``.
        chat_templates: Jinja sources by name; the one named ``default`` is used unless tools call for
            ``tool_use``. Empty: the model has none.
    """

    backend: tokenizers.Tokenizer
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    named_special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str] = field(default_factory=dict)
