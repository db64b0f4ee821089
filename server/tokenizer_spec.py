"""What a model's files say about its tokenizer, whichever format they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import tokenizers

T = TypeVar("T")


class TokenizerError(Exception):
    """The tokenizer cannot be loaded; the message says why and what would work."""


def checked(work: Callable[[], T], what: str) -> T:
    """Does something with the tokenizers library and what somebody else wrote.

    Raises:
        TokenizerError: beginning with ``what``, for all that the library raises, which is plain Exception,
            and its panics, which are not even that.
    """
    try:
        return work()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {error}") from None


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
