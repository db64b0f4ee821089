"""Rotary embedding and paged attention in plain numpy and float64: what every kernel is tested against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
Float64Array = npt.NDArray[np.float64]


def rotate(x: FloatArray, cos: FloatArray, sin: FloatArray) -> Float64Array:
    """Rotary embedding (arXiv:2104.09864), halves convention: element i pairs with element i + head_dim / 2.

    Args:
        x: [num_tokens, num_heads, head_dim].
        cos, sin: [num_tokens, head_dim / 2], rows of the tokens' positions.
    """
    x = x.astype(np.float64)
    c, s = cos[:, None, :].astype(np.float64), sin[:, None, :].astype(np.float64)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: FloatArray | None = None,
) -> Float64Array:
    """Causal attention of the last tokens of one sequence.

    Args:
        q: [num_queries, num_heads, head_dim], the last ``num_queries`` tokens; already rotated.
        k, v: [context_len, num_kv_heads, head_dim]; query head h reads KV head h * num_kv_heads // num_heads.
        sinks: [num_heads], a further logit of each head, whose weight goes nowhere.

    Returns:
        [num_queries, num_heads, head_dim]
    """
    num_queries, num_heads, _ = q.shape
    context_len, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    k = np.repeat(k.astype(np.float64), group, axis=1)
    v = np.repeat(v.astype(np.float64), group, axis=1)
    scores = q.astype(np.float64).transpose(1, 0, 2) @ k.transpose(1, 2, 0) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    position = np.arange(context_len - num_queries, context_len)[:, None]
    key = np.arange(context_len)[None, :]
    visible = key <= position
    if sliding_window is not None:
        visible &= key > position - sliding_window
    scores = np.where(visible, scores, -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(sinks.astype(np.float64)[:, None, None], (num_heads, num_queries, 1))
        scores = np.concatenate([scores, sink], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    weights = weights[..., :context_len]
    result: Float64Array = (weights @ v.transpose(1, 0, 2)).transpose(1, 0, 2)
    return result


def paged_attention(
    qkv: FloatArray,
    key_cache: FloatArray,
    value_cache: FloatArray,
    query_start: npt.NDArray[np.int32],
    context_len: npt.NDArray[np.int32],
    block_tables: npt.NDArray[np.int32],
    cos: FloatArray,
    sin: FloatArray,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: FloatArray | None = None,
) -> Float64Array:
    """One layer of one step, as ``kernels.cpu.PagedAttention``: writes k and v into the caches, then attends.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_dim]; updated in place.
        query_start, context_len, block_tables: see ``kernels.cpu.StepLayout``.

    Returns:
        [num_tokens, num_heads * head_dim]
    """
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    result = np.empty((len(qkv), num_heads * head_dim))
    for sequence, context in enumerate(context_len.tolist()):
        rows = slice(query_start[sequence], query_start[sequence + 1])
        tokens = qkv[rows].reshape(-1, num_heads + 2 * num_kv_heads, head_dim)
        positions = np.arange(context - len(tokens), context)
        q = rotate(tokens[:, :num_heads], cos[positions], sin[positions])
        k = rotate(tokens[:, num_heads:-num_kv_heads], cos[positions], sin[positions])
        all_positions = np.arange(context)
        blocks, slots = block_tables[sequence, all_positions // block_size], all_positions % block_size
        key_cache[blocks[positions], :, slots[positions]] = k
        value_cache[blocks[positions], :, slots[positions]] = tokens[:, -num_kv_heads:]
        output = attention(
            q, key_cache[blocks, :, slots], value_cache[blocks, :, slots],
            scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks,
        )  # fmt: skip
        result[rows] = output.reshape(len(tokens), -1)
    return result
