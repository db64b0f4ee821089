"""A lower bound of a text's number of tokens, without tokenizing it.

Tokens cover the bytes of a text exactly once. Give each byte the weight 1 / (length of the longest token
that has that byte in it): then no token weighs more than 1, so the text has at least as many tokens as its
bytes weigh. This is a good deal better than dividing by the longest token, which is usually a rule of 80
hyphens.
"""

from __future__ import annotations

import json
import math
from typing import Any

import tokenizers

from server.token_bytes import TokenBytes

_SPACES = frozenset(b"\t\n\v\f\r ")
# NFC may shorten text: at most three bytes become one (U+212A KELVIN SIGN -> K; three Hangul jamo -> one
# syllable).
_NFC_SHRINK = 3


_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


class TokenBound:
    """``at_least(text)`` for one tokenizer. Making one reads the whole vocabulary (about 1 us a token)."""

    def __init__(self, backend: tokenizers.Tokenizer, table: TokenBytes, vocab_size: int) -> None:
        self._longest_with = [0] * 256
        self._composes = False
        if table.is_byte_complete and self._keeps_all_text(backend):
            self._weigh(sorted((table[token] for token in range(vocab_size)), key=len, reverse=True))
        if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
            # Such tokens swallow the white space beside them, some of which is not ASCII.
            for byte in [*_SPACES, *range(0x80, 0x100)]:
                self._longest_with[byte] = 0
        self._bytes_by_length: dict[int, bytes] = {}
        for length in set(self._longest_with) - {0}:
            self._bytes_by_length[length] = bytes(
                byte for byte, longest in enumerate(self._longest_with) if longest == length
            )

    def at_least(self, text: str) -> int:
        """Never more than ``len(encode(text))``; 0 if the tokenizer allows no bound."""
        data = text.encode("utf-8", "surrogatepass")
        if self._composes and not data.isascii():
            if not all(self._longest_with[byte] for byte in _UTF8_BYTES):
                return 0
            weight = len(data) / (_NFC_SHRINK * max(self._longest_with))
        else:
            weight = sum(
                (len(data) - len(data.translate(None, members))) / length
                for length, members in self._bytes_by_length.items()
            )
        return math.ceil(weight - 1e-6)

    def _weigh(self, pieces: list[bytes]) -> None:
        missing = set(range(256))
        for piece in pieces:
            for byte in missing.intersection(piece):
                self._longest_with[byte] = len(piece)
                missing.discard(byte)

    def _keeps_all_text(self, backend: tokenizers.Tokenizer) -> bool:
        """Whether nothing is taken out of the text before it is merged into tokens; notes NFC."""
        for step in _steps(backend.normalizer, "normalizers"):
            match step:
                case {"type": "Prepend"} | {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                    pass
                case {"type": "NFC"}:
                    self._composes = True
                case _:
                    return False
        for step in _steps(backend.pre_tokenizer, "pretokenizers"):
            if step["type"] not in ("ByteLevel", "Metaspace", "Digits", "Split"):
                return False
            if step.get("behavior") == "Removed":
                return False
        return True


def _steps(component: Any, parts: str) -> list[dict[str, Any]]:
    if component is None:
        return []
    return _flatten(json.loads(component.__getstate__()), parts)


def _flatten(step: dict[str, Any], parts: str) -> list[dict[str, Any]]:
    if step["type"] == "Sequence":
        return [inner for part in step[parts] for inner in _flatten(part, parts)]
    return [step]
