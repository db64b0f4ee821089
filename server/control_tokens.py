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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, models

T = TypeVar("T")

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class ControlTokenError(ValueError):
    """A control token in a client's text cannot be kept plain."""


@dataclass(frozen=True, slots=True)
class Shield:
    """Which first letters of control tokens are replaced by which private-use letters."""

    letters: Mapping[str, str]


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = dict(sorted(backend.get_added_tokens_decoder().items()))
        self._names = [token.content for token in self._added.values() if token.special and token.content]
        self._first_letters = frozenset(name[0] for name in self._names)
        self._longest_name = max(map(len, self._names), default=0)

    def shield(self, value: T) -> tuple[Shield | None, T]:
        """Shields the control tokens in all strings of a JSON value, and what they end with if it is the
        beginning of one: whatever follows in the rendered chat could complete it.

        Returns:
            None and the same value if there is nothing to shield, else a shield and a changed copy.

        Raises:
            ControlTokenError: the strings leave no letter that could stand for another.
            UnicodeEncodeError: a string has lone surrogates.
        """
        strings: list[str] = []
        _collect(value, strings)
        suspects = [
            number
            for number, text in enumerate(strings)
            if any(letter in text for letter in self._first_letters)
        ]
        positions = self._positions([strings[number] for number in suspects])
        if not any(positions):
            return None, value
        letters: dict[str, str] = {}
        unused = _unused_letters(strings)
        for number, starts in zip(suspects, positions, strict=True):
            for letter in {strings[number][start] for start in starts} - letters.keys():
                letters[letter] = next(unused)
            strings[number] = _with_letters(strings[number], starts, letters)
        return Shield(letters), _rebuild(value, iter(strings))

    def encode(self, text: str, shield: Shield) -> list[int]:
        """Token ids of a rendered chat whose client strings are shielded.

        Raises:
            ControlTokenError: the tokenizer makes a control token even out of plain text.
        """
        tokenizer, aliases, real_ids = self._aliased
        pieces, end = [], 0
        for start, stop in self._find([text])[0]:
            pieces += [text[end:start], aliases[text[start:stop]]]
            end = stop
        plain = "".join(pieces) + text[end:]
        for letter, stand_in in shield.letters.items():
            plain = plain.replace(stand_in, letter)
        ids = tokenizer.encode_batch_fast([plain], add_special_tokens=False)[0].ids
        for token_id in ids:
            token = self._added.get(token_id)
            if token is not None and token.special and token_id not in real_ids:
                raise ControlTokenError(
                    f"{token.content!r} cannot be sent as text to this model: spell it otherwise."
                )
        return [real_ids.get(token_id, token_id) for token_id in ids]

    def _positions(self, texts: list[str]) -> list[set[int]]:
        """For each text, where the first letters of control tokens and of their beginnings at the end are."""
        found: list[set[int]] = [set() for _ in texts]
        rest, blanks = texts, dict.fromkeys(self._first_letters, "\0")
        # Once more after each find: a control token may overlap another one.
        while any(spans := self._find(rest)):
            for starts, matches in zip(found, spans, strict=True):
                starts.update(start for start, _ in matches)
            rest = [_with_letters(text, starts, blanks) for text, starts in zip(texts, found, strict=True)]
        for starts, text in zip(found, texts, strict=True):
            starts.update(
                start
                for start in range(max(0, len(text) - self._longest_name), len(text))
                if text[start] in self._first_letters and text[start:] in self._beginnings
            )
        return found

    def _find(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        """Start and end of each control token in each text."""
        for text in texts:
            text.encode()  # lone surrogates: a UnicodeEncodeError, not the library's TypeError
        # encode_batch, not encode: it lets other threads run.
        return [
            [span for token_id, span in zip(encoding.ids, encoding.offsets, strict=True) if token_id]
            for encoding in self._scanner.encode_batch(texts)
        ]

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(name[:length] for name in self._names for length in range(1, len(name)))

    @cached_property
    def _scanner(self) -> tokenizers.Tokenizer:
        """A tokenizer to which all but the control tokens is one unknown word: their search, without a
        vocabulary.
        """
        scanner = tokenizers.Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        scanner.add_special_tokens([AddedToken(content, normalized=False) for content in self._names])
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


def _unused_letters(strings: list[str]) -> Iterator[str]:
    used = set().union(*strings)
    yield from (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    raise ControlTokenError("The messages use up all private-use characters.")


def _with_letters(text: str, positions: set[int], letters: Mapping[str, str]) -> str:
    """``text`` with the letters at the positions replaced."""
    pieces, end = [], 0
    for position in sorted(positions):
        pieces += [text[end:position], letters[text[position]]]
        end = position + 1
    return "".join(pieces) + text[end:]


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


def _rebuild(value: Any, strings: Iterator[str]) -> Any:
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
