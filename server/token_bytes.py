"""The bytes that each token stands for: decoding by table, one look-up a token.

Byte-level tokenizers (GPT-2's) spell a byte as one printable letter; SentencePiece-style ones spell a space
as U+2581 and a lone byte as ``<0xE2>``. In both, the text of a sequence is its tokens' bytes in a row,
decoded as UTF-8, but for one thing: SentencePiece puts a space before the first word of a text, which
decoding takes away again.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import tokenizers

from server.tokenizer_spec import TokenizerError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class LeadingSpace(enum.Enum):
    """What decoding does to the space at the very start of a text."""

    KEPT = enum.auto()
    ONE_REMOVED = enum.auto()  # one space off the text (decoder ``Strip``)
    REMOVED_FROM_FIRST_TOKEN = enum.auto()  # all U+2581 of the first token (decoder ``Metaspace``)


def _printable_bytes() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 letters stand for themselves, the others for U+0100 and
    on.
    """
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(themselves)]
    return {chr(byte): byte for byte in themselves} | {chr(256 + n): byte for n, byte in enumerate(others)}


_PRINTABLE_BYTES = _printable_bytes()
_TO_LATIN1 = {ord(letter): chr(byte) for letter, byte in _PRINTABLE_BYTES.items()}
_PRINTABLE_LETTERS = frozenset(_PRINTABLE_BYTES)


def _byte_level(token: str) -> bytes:
    if _PRINTABLE_LETTERS.issuperset(token):
        return token.translate(_TO_LATIN1).encode("latin-1")
    return token.encode()


class TokenBytes(dict[int, bytes]):
    """``table[token_id]`` -> bytes, computed on first use; ids outside the vocabulary give no bytes.

    Attributes:
        leading_space: what happens to a space at the start of a text.
        is_byte_complete: every byte of a text is one byte of one token, so text is never lost or fused.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._backend = backend
        self._replacement = "▁"
        self._spell: Callable[[str], bytes] = str.encode
        self.leading_space = LeadingSpace.KEPT
        self.is_byte_complete = False
        self._read_decoder()
        for token_id, token in backend.get_added_tokens_decoder().items():
            self[token_id] = self._added(token)

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        spelled = self[token_id] = self._spell(token)
        return spelled

    def hiding(self, hidden: Iterable[int]) -> TokenBytes:
        """A table in which the given tokens have no bytes."""
        table = TokenBytes(self._backend)
        table.update(dict.fromkeys(hidden, b""))
        return table

    def without_leading_space(self, token_id: int) -> bytes:
        """The bytes of a token that starts a text, for ``REMOVED_FROM_FIRST_TOKEN``."""
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._spell(token.replace(self._replacement, ""))

    def _added(self, token: tokenizers.AddedToken) -> bytes:
        if self._spell == self._sentencepiece and not token.special:
            return self._sentencepiece(token.content)
        return token.content.encode()

    def _sentencepiece(self, token: str) -> bytes:
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace(self._replacement, " ").encode()

    def _metaspace(self, token: str) -> bytes:
        return token.replace(self._replacement, " ").encode()

    def _after_a_space(self, token: str) -> bytes:
        return b" " + token.encode()

    def _read_decoder(self) -> None:
        decoder = self._backend.decoder
        if decoder is None:  # words with a space between them
            self._spell, self.leading_space = self._after_a_space, LeadingSpace.ONE_REMOVED
            return
        steps = _flatten(json.loads(decoder.__getstate__()))
        kinds = [step["type"] for step in steps]
        for step in steps:
            if not _is_understood(step):
                raise TokenizerError(
                    f"The tokenizer decodes with {json.dumps(step)}, which is not supported: "
                    "byte-level and SentencePiece-style tokenizers are."
                )
        if kinds == ["ByteLevel"]:
            self._spell, self.is_byte_complete = _byte_level, True
            return
        if "ByteLevel" in kinds:
            raise TokenizerError(f"The tokenizer decodes with {' + '.join(kinds)}, which is not supported.")
        if "ByteFallback" in kinds:
            self._spell = self._sentencepiece
            self.is_byte_complete = all(
                self._backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)
            )
        elif "Replace" in kinds or "Metaspace" in kinds:
            self._spell = self._metaspace
        for step in steps:
            if step["type"] == "Strip" and step["start"]:
                self.leading_space = LeadingSpace.ONE_REMOVED
            elif step["type"] == "Metaspace":
                self._replacement = step["replacement"]
                if step["prepend_scheme"] != "never":
                    self.leading_space = LeadingSpace.REMOVED_FROM_FIRST_TOKEN


def with_plain_spaces(backend: tokenizers.Tokenizer) -> str:
    """The tokenizer as JSON, its decoder without ``Metaspace``, which llguidance does not know.

    What takes its place gives each token the bytes that ``TokenBytes`` gives it.
    """
    written = backend.to_str()
    if backend.decoder is None or b"Metaspace" not in backend.decoder.__getstate__():
        return written
    whole = json.loads(written)
    steps = [
        {"type": "Replace", "pattern": {"String": step["replacement"]}, "content": " "}
        if step["type"] == "Metaspace"
        else step
        for step in _flatten(whole["decoder"])
    ]
    whole["decoder"] = {"type": "Sequence", "decoders": steps}
    return json.dumps(whole, ensure_ascii=False)


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flatten(part)]
    return [decoder]


def _is_understood(step: dict[str, Any]) -> bool:
    match step["type"]:
        case "ByteLevel" | "ByteFallback" | "Fuse" | "Metaspace":
            return True
        case "Replace":
            return bool(step["pattern"] == {"String": "▁"} and step["content"] == " ")
        case "Strip":
            return bool(step["content"] == " " and step["start"] in (0, 1) and step["stop"] == 0)
    return False
