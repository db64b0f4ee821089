"""What the samplers compute, in plain numpy: sorts, and sums in float64. For tests, also without numba."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine_runtime.kernels.numpy_types import Float32Array, Float64Array
from engine_runtime.kernels.sampling_rows import GREEDY_TEMPERATURE, random_state, uniforms
from scheduler.messages import SampledToken, SamplingParams, TokenLogprobs

_LOG2_E = np.float32(1.4426950408889634)
_SMALLEST = np.float32(2.0**-126)


def sample_row(
    logits: Float32Array,
    params: SamplingParams,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    is_allowed: npt.NDArray[np.bool_] | None = None,
    request_id: str = "",
) -> SampledToken:
    """The next token of one sequence.

    Args:
        logits: float32 [V], not changed.
        token_ids: prompt and generated tokens so far.
        is_allowed: [V], what a grammar allows; None for all.
    """
    changed = change_logits(logits, params, token_ids, num_prompt_tokens, is_allowed)
    if not (_is_valid(logits) and _is_valid(changed)):
        return SampledToken(request_id, 0, None, False)
    token = int(np.argmax(changed))
    if params.temperature >= GREEDY_TEMPERATURE:
        kept = kept_weights(changed, params)
        cumulative = np.cumsum(kept)
        position = np.array([len(token_ids)], np.int64)
        target = uniforms(np.array([random_state(params.seed)]), position)[0] * cumulative[-1]
        crossed = np.flatnonzero((cumulative > target) & (kept > 0.0))
        token = int(crossed[0]) if len(crossed) else int(np.flatnonzero(kept)[-1])
    logprobs = None if params.logprobs is None else token_logprobs(logits, token, params.logprobs)
    return SampledToken(request_id, token, logprobs, True)


def change_logits(
    logits: Float32Array,
    params: SamplingParams,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    is_allowed: npt.NDArray[np.bool_] | None = None,
) -> Float32Array:
    """Logits after the grammar, forbidden stop tokens, biases and penalties."""
    changed = logits.copy()
    vocab_size = len(logits)
    if is_allowed is not None:
        changed[~is_allowed] = -np.inf
    if len(token_ids) - num_prompt_tokens < params.min_tokens:
        changed[[t for t in params.stop_token_ids if 0 <= t < vocab_size]] = -np.inf
    for token_id, bias in params.logit_bias:
        if 0 <= token_id < vocab_size:
            changed[token_id] += np.float32(bias)
    known = [t for t in token_ids if 0 <= t < vocab_size]
    counts = np.bincount(
        [t for t in token_ids[num_prompt_tokens:] if 0 <= t < vocab_size], minlength=vocab_size
    ).astype(np.float32)
    seen = np.zeros(vocab_size, np.bool_)
    seen[known] = True
    repetition = np.float32(params.repetition_penalty)
    changed[seen] = np.where(changed[seen] > 0, changed[seen] / repetition, changed[seen] * repetition)
    generated = counts > 0
    changed[generated] -= np.float32(params.frequency_penalty) * counts[generated] + np.float32(
        params.presence_penalty
    )
    return changed


def kept_weights(logits: Float32Array, params: SamplingParams) -> Float64Array:
    """float64 [V]: exp((logit - largest) / temperature) where min_p, top_k and top_p keep it, else 0."""
    factor = np.float32(1.0 / params.temperature) * _LOG2_E
    exponents = (logits - logits.max()) * factor
    weights = np.where(exponents < -126, np.float32(0.0), np.exp2(exponents)).astype(np.float32)
    order = np.argsort(-weights, kind="stable")
    ordered = weights[order].astype(np.float64)
    if params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0:
        number = int(np.count_nonzero(ordered >= max(np.float32(params.min_p), _SMALLEST)))
        if 0 < params.top_k < number:
            number = params.top_k
        if params.top_p < 1.0:
            cumulative = np.cumsum(ordered[:number])
            number = min(number, int(np.searchsorted(cumulative, params.top_p * cumulative[-1])) + 1)
        ordered[number:] = 0.0
    kept = np.zeros(len(weights))
    kept[order] = ordered
    return kept


def token_logprobs(logits: Float32Array, token_id: int, top_n: int) -> TokenLogprobs:
    """How likely a token was, from the logits as they came. Equal logits are ordered by token id."""
    values = logits.astype(np.float64)
    offset = values.max() + math.log(np.exp(values - values.max()).sum())
    order = np.argsort(-values, kind="stable")[:top_n]
    top = tuple(zip(order.tolist(), (values[order] - offset).tolist(), strict=True))
    rank = 1 + int(np.count_nonzero(logits > logits[token_id]))
    return TokenLogprobs(token_id, float(values[token_id] - offset), rank, top)


def _is_valid(logits: Float32Array) -> bool:
    return bool((logits < np.inf).all() and (logits > -np.inf).any())
