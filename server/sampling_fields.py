"""How tokens are chosen: from the fields of a request to ``SamplingParams``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.errors import InvalidRequestError, UnsupportedParameterError, excerpt
from server.protocol import SamplingFields
from server.tokenizer import Tokenizer

# Far above all differences between logits, and small enough to leave these to a 32-bit float.
_ALLOWED_BIAS = 1_000.0
_FORBIDDEN_BIAS = -10_000.0


def sampling_fields(
    wire: SamplingFields,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> dict[str, Any]:
    """Those arguments of ``SamplingParams`` that all sequences of a request share.

    Args:
        vocab_size: of the model.
        logprobs, prompt_logprobs: alternatives reported with each token; None reports nothing.

    Raises:
        InvalidRequestError: ids that are no tokens of the model, or words that cannot be kept out.
    """
    _check_ids("stop_token_ids", wire.stop_token_ids or (), vocab_size)
    _check_ids("allowed_token_ids", wire.allowed_token_ids or (), vocab_size)
    stop_token_ids = list(wire.stop_token_ids or ())
    if not wire.ignore_eos:
        stop_token_ids += tokenizer.eos_token_ids
    return {
        "temperature": _given(wire.temperature, 1.0),
        "top_k": max(wire.top_k or 0, 0),
        "top_p": _given(wire.top_p, 1.0),
        "min_p": _given(wire.min_p, 0.0),
        "presence_penalty": _given(wire.presence_penalty, 0.0),
        "frequency_penalty": _given(wire.frequency_penalty, 0.0),
        "repetition_penalty": _given(wire.repetition_penalty, 1.0),
        "logit_bias": _biases(wire, tokenizer, vocab_size),
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "stop_token_ids": tuple(dict.fromkeys(stop_token_ids)),
    }


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _check_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for index, token_id in enumerate(token_ids):
        if token_id >= vocab_size:
            raise InvalidRequestError(
                f"'{name}[{index}]' is no token of this model, which has {vocab_size}.",
                param=f"{name}[{index}]",
                code="integer_above_max_value",
            )


def _biases(wire: SamplingFields, tokenizer: Tokenizer, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """``logit_bias``, with ``allowed_token_ids`` far above and ``bad_words`` far below all other tokens."""
    biases: dict[int, float] = {}
    for key, value in (wire.logit_bias or {}).items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else -1
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"A key of 'logit_bias', {excerpt(key)}, is no token id: expected 0 to {vocab_size - 1}.",
                param="logit_bias",
                code="invalid_value",
            )
        biases[token_id] = float(value)
    for token_id in set(wire.allowed_token_ids or ()):
        biases[token_id] = biases.get(token_id, 0.0) + _ALLOWED_BIAS
    for index, word in enumerate(wire.bad_words or ()):
        for token_id in _tokens_of(word, index, tokenizer):
            biases[token_id] = _FORBIDDEN_BIAS
    return tuple(biases.items())


def _tokens_of(word: str, index: int, tokenizer: Tokenizer) -> list[int]:
    """The tokens that a word is, at the beginning of a text and behind a space."""
    word = word.lstrip(" ")
    spelled = [tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}")]
    found = [ids[0] for ids in spelled if len(ids) == 1]
    if not found:
        raise UnsupportedParameterError(
            f"'bad_words[{index}]' is not supported: only words that are one token of this model can be "
            "kept out.",
            param=f"bad_words[{index}]",
        )
    return found
