"""Keeps control tokens that clients write into a chat from becoming control tokens.

``<|im_end|>`` in a message is text about a control token, not one: were it encoded as one, a client could
end its own turn and write the system's. So, if the client's strings contain any:

1. **shield**: the first letter of each, in the client's strings, is replaced by a letter that occurs nowhere;
2. the template is rendered: every control token that is now in the text was written by the template;
3. each of those gets another name, one that no client can know; then the shielded letters are put back;
4. the text is encoded by a tokenizer that knows the control tokens by those other names only.

The whole text is encoded in one go, so that the words around the shielded token are cut exactly as usual.
Without control tokens in the client's strings none of this happens.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, models

T = TypeVar("T")

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True, slots=True)
class Shield:
    """Which private-use letter stands for which first letter of a control token."""

    letters: Mapping[int, str]


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = dict(sorted(backend.get_added_tokens_decoder().items()))
        self._ids = {token.content: token_id for token_id, token in self._added.items() if token.special}
        self._first_letters = frozenset(content[0] for content in self._ids if content)

    def shield(self, value: T) -> tuple[Shield | None, T]:
        """Shields control tokens in all strings of a JSON value, also those spread over neighbouring strings.

        Returns:
            None and the same value if there are no control tokens in it, else a shield and a changed copy.
        """
        strings: list[str] = []
        _collect(value, strings)
        text = "".join(strings)
        if self._first_letters.isdisjoint(text):
            return None, value
        letters: dict[str, str] = {}
        shielded = text
        # Shielding a token may uncover another one inside it.
        while spans := self._find(shielded):
            pieces, end = [], 0
            for start, _, _ in spans:
                letter = shielded[start]
                if letter not in letters:
                    letters[letter] = _unused_letter(text, letters)
                pieces += [shielded[end:start], letters[letter]]
                end = start + 1
            shielded = "".join(pieces) + shielded[end:]
        if not letters:
            return None, value
        replacements = iter(_cut(shielded, strings))
        return Shield({ord(stand_in): letter for letter, stand_in in letters.items()}), _rebuild(
            value, replacements
        )

    def encode(self, text: str, shield: Shield) -> list[int]:
        """Token ids of a rendered chat whose client strings are shielded."""
        tokenizer, aliases, real_ids = self._aliased
        pieces, end = [], 0
        for start, stop, name in self._find(text):
            pieces += [text[end:start], aliases[name]]
            end = stop
        plain = ("".join(pieces) + text[end:]).translate(shield.letters)
        ids = tokenizer.encode_batch_fast([plain], add_special_tokens=False)[0].ids
        return [real_ids.get(token_id, token_id) for token_id in ids]

    def _find(self, text: str) -> list[tuple[int, int, str]]:
        """Start, end and name of each control token in the text."""
        # encode_batch, not encode: it lets other threads run.
        encoding = self._scanner.encode_batch([text])[0]
        spans = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id:
                spans.append((start, end, text[start:end]))
        return spans

    @cached_property
    def _scanner(self) -> tokenizers.Tokenizer:
        """A tokenizer to which all but the control tokens is one unknown word: their search, without a
        vocabulary.
        """
        scanner = tokenizers.Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        scanner.add_special_tokens([AddedToken(content, normalized=False) for content in self._ids])
        return scanner

    @cached_property
    def _aliased(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """The same tokenizer (its vocabulary is shared) with other names for the control tokens.

        Returns:
            The tokenizer, name -> alias, and its ids of added tokens -> those of the model.
        """
        nonce = secrets.token_hex(16)
        tokenizer = tokenizers.Tokenizer(self._backend.model)
        if self._backend.normalizer is not None:
            tokenizer.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            tokenizer.pre_tokenizer = self._backend.pre_tokenizer
        aliases: dict[str, str] = {}
        added = []
        for token_id, token in self._added.items():
            content = token.content
            if token.special:
                content = aliases[token.content] = f"\U000ffffd{nonce}:{token_id}\U000ffffd"
            added.append(
                AddedToken(
                    content,
                    single_word=token.single_word and not token.special,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized and not token.special,
                    special=token.special,
                )
            )
        tokenizer.add_tokens(added)
        real_ids = {}
        for token_id, token in self._added.items():
            own_id = tokenizer.token_to_id(aliases.get(token.content, token.content))
            assert own_id is not None
            real_ids[own_id] = token_id
        return tokenizer, aliases, real_ids


def _unused_letter(text: str, taken: Mapping[str, str]) -> str:
    used = set(text) | set(taken.values())
    for code in _PRIVATE_USE:
        if chr(code) not in used:
            return chr(code)
    raise ValueError("The messages use up all private-use characters.")


def _collect(value: Any, strings: list[str]) -> None:
    if isinstance(value, str):
        strings.append(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _collect(key, strings)
            _collect(inner, strings)
    elif isinstance(value, list | tuple):
        for inner in value:
            _collect(inner, strings)


def _cut(text: str, strings: list[str]) -> list[str]:
    """``text`` in pieces as long as ``strings``."""
    pieces, start = [], 0
    for string in strings:
        pieces.append(text[start : start + len(string)])
        start += len(string)
    return pieces


def _rebuild(value: Any, strings: Any) -> Any:
    """``value`` with its strings, in the order of ``_collect``, replaced by the next of ``strings``."""
    if isinstance(value, str):
        return next(strings)
    if isinstance(value, Mapping):
        return {_rebuild(key, strings): _rebuild(inner, strings) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(_rebuild(inner, strings) for inner in value)
    if isinstance(value, list):
        return [_rebuild(inner, strings) for inner in value]
    return value
