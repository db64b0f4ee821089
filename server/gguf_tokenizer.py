"""The tokenizer of a GGUF file, from the file's own metadata: token for token that of llama.cpp.

Two kinds: ``gpt2`` (byte-level byte-pair encoding, with a list of merges and a named pre-tokenizer) and
``llama`` (SentencePiece's byte-pair encoding, whose merges follow from the tokens' scores).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from server.gguf_metadata import GgufError, read_gguf_metadata
from server.pre_tokenizers import pre_tokenizer_named
from server.tokenizer_spec import TokenizerError, TokenizerSpec, checked

_PREFIX = "tokenizer.ggml."
_NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Files often name only one end token; models end their turns with these all the same.
_END_TOKENS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<EOT>", "<end_of_utterance>", "<｜end▁of▁sentence｜>",
)  # fmt: skip


class TokenType(enum.IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Plain numbers: looked up once a token.
_MERGEABLE = frozenset(map(int, (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)))
_ADDED = frozenset(map(int, (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)))


def tokenizer_from_gguf(path: Path) -> TokenizerSpec:
    """Reads the metadata and builds the tokenizer: 0.1 s for 49k tokens with merges, 1.5 s for 262k with
    scores.

    Raises:
        TokenizerError: not a GGUF file, damaged, without a tokenizer, or one of a kind that is not supported.
    """
    try:
        return tokenizer_from_metadata(read_gguf_metadata(path))
    except GgufError as error:
        raise TokenizerError(str(error)) from None


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> TokenizerSpec:
    """The same from what ``read_gguf_metadata`` returns."""
    vocabulary = _Vocabulary(metadata)
    match vocabulary.text("model"):
        case "gpt2":
            backend, adds_bos = _byte_level(vocabulary)
        case "llama":
            backend, adds_bos = _sentencepiece(vocabulary)
        case model:
            raise TokenizerError(
                f"The GGUF file's tokenizer is of the kind {model!r}; 'gpt2' and 'llama' are supported."
            )
    backend.add_tokens(vocabulary.added_tokens())
    _add_bos_and_eos(backend, vocabulary, adds_bos)
    bos_id = vocabulary.token_id("bos_token_id")
    return TokenizerSpec(
        backend=backend,
        bos_token_id=bos_id,
        eos_token_ids=vocabulary.end_ids(),
        named_special_tokens={
            name: vocabulary.tokens[token_id]
            for name, key in _NAMED_TOKENS.items()
            if (token_id := vocabulary.token_id(key)) is not None
        },
        chat_templates=_chat_templates(metadata),
    )


class _Vocabulary:
    """The ``tokenizer.ggml`` part of the metadata, checked."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        tokens = metadata.get(_PREFIX + "tokens")
        if not isinstance(tokens, list) or not tokens:
            raise TokenizerError("The GGUF file has no vocabulary (tokenizer.ggml.tokens).")
        self.tokens: list[str] = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise TokenizerError("The GGUF file's vocabulary has the same token twice.")
        types = self._numbers("token_type")
        self.types: list[int] = list(types) if types is not None else [TokenType.NORMAL] * len(tokens)
        for token in _END_TOKENS:
            if token in self.ids:
                self.types[self.ids[token]] = TokenType.CONTROL

    def text(self, key: str, default: str | None = None) -> str:
        value = self._metadata.get(_PREFIX + key, default)
        if not isinstance(value, str):
            raise TokenizerError(f"The GGUF file has no usable {_PREFIX}{key}.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._metadata.get(_PREFIX + key, default))

    def strings(self, key: str) -> list[str]:
        value = self._metadata.get(_PREFIX + key)
        if not isinstance(value, list):
            raise TokenizerError(f"The GGUF file has no {_PREFIX}{key}.")
        return value

    def scores(self) -> Sequence[float]:
        scores = self._numbers("scores")
        if scores is None:
            raise TokenizerError(f"The GGUF file has no {_PREFIX}scores.")
        return scores

    def token_id(self, key: str) -> int | None:
        value = self._metadata.get(_PREFIX + key)
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def end_ids(self) -> tuple[int, ...]:
        named = [self.token_id(key) for key in _END_KEYS]
        known = [self.ids.get(token) for token in _END_TOKENS]
        return tuple(dict.fromkeys(token for token in [*named, *known] if token is not None))

    def added_tokens(self) -> list[AddedToken]:
        """Tokens that are looked for in the text before anything else."""
        return [
            AddedToken(token, normalized=False, special=kind != TokenType.USER_DEFINED)
            for token, kind in zip(self.tokens, self.types, strict=False)
            if kind in _ADDED
        ]

    def _numbers(self, key: str) -> Sequence[Any] | None:
        value = self._metadata.get(_PREFIX + key)
        if value is None:
            return None
        if isinstance(value, list | str) or not hasattr(value, "__len__") or len(value) < len(self.tokens):
            raise TokenizerError(f"The GGUF file's {_PREFIX}{key} does not fit its vocabulary.")
        return value  # type: ignore[no-any-return]


def _byte_level(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    kind = pre_tokenizer_named(vocabulary.text("pre", "default"))
    merges = []
    for number, merge in enumerate(vocabulary.strings("merges")):
        # A left half may itself start with a space.
        middle = merge.find(" ", 1)
        if middle < 0:
            raise TokenizerError(f"Merge {number} of the GGUF file is not a pair of tokens.")
        merges.append((merge[:middle], merge[middle + 1 :]))
    backend = _bpe(vocab=vocabulary.ids, merges=merges, ignore_merges=kind.ignore_merges)
    backend.pre_tokenizer = kind.build()
    backend.decoder = decoders.ByteLevel()
    return backend, kind.adds_bos


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    adds_space = vocabulary.flag("add_space_prefix", True)
    unknown = vocabulary.token_id("unknown_token_id")
    has_bytes = all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256))
    backend = _bpe(
        vocab=vocabulary.ids,
        merges=_merges_by_score(vocabulary),
        unk_token=vocabulary.tokens[0 if unknown is None else unknown],
        fuse_unk=True,
        byte_fallback=has_bytes,
    )
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if adds_space else spaces)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
    return backend, True


def _bpe(**arguments: Any) -> tokenizers.Tokenizer:
    return checked(
        lambda: tokenizers.Tokenizer(models.BPE(**arguments)),
        "The GGUF file's vocabulary and merges do not fit together",
    )


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Pairs of tokens that make a third, best score first.

    SentencePiece merges whichever neighbours make the token with the best score; as a list of merges in
    that order this is the usual byte-pair encoding.
    """
    scores, tokens, types = vocabulary.scores(), vocabulary.tokens, vocabulary.types
    mergeable = {token for token, kind in zip(tokens, types, strict=False) if kind in _MERGEABLE}
    merges: list[tuple[str, str]] = []
    for number in sorted(range(len(tokens)), key=scores.__getitem__, reverse=True):
        token = tokens[number]
        if token in mergeable:
            merges += [
                (left, token[middle:])
                for middle in range(1, len(token))
                if (left := token[:middle]) in mergeable and token[middle:] in mergeable
            ]
    return merges


def _add_bos_and_eos(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary, adds_bos: bool) -> None:
    template: list[str] = ["$A"]
    special: list[dict[str, Any]] = []
    for key, is_on in (
        ("bos", vocabulary.flag("add_bos_token", adds_bos)),
        ("eos", vocabulary.flag("add_eos_token", False)),
    ):
        token_id = vocabulary.token_id(f"{key}_token_id")
        if is_on and token_id is not None:
            # By its role: in a template, a colon in the token itself would mean something.
            template.insert(0 if key == "bos" else len(template), key)
            special.append({"id": key, "ids": [token_id], "tokens": [vocabulary.tokens[token_id]]})
    if special:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    templates = {}
    if isinstance(source := metadata.get("tokenizer.chat_template"), str):
        templates["default"] = source
    names = metadata.get("tokenizer.chat_templates")
    for name in names if isinstance(names, list) else ():
        if isinstance(source := metadata.get(f"tokenizer.chat_template.{name}"), str):
            templates[name] = source
    return templates
