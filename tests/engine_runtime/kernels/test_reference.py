"""The reference itself, against the definitions written out as loops and in complex numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine_runtime.kernels import reference


def attention_by_loops(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int | None, softcap: float | None
) -> np.ndarray:
    queries, heads, dim = q.shape
    context, kv_heads, _ = k.shape
    out = np.zeros_like(q)
    for i in range(queries):
        position = context - queries + i
        for h in range(heads):
            kv = h // (heads // kv_heads)
            first = 0 if window is None else max(0, position - window + 1)
            weights = []
            for j in range(first, position + 1):
                score = scale * sum(q[i, h, c] * k[j, kv, c] for c in range(dim))
                if softcap is not None:
                    score = softcap * math.tanh(score / softcap)
                weights.append(math.exp(score))
            for w, j in zip(weights, range(first, position + 1), strict=True):
                out[i, h] += w / sum(weights) * v[j, kv]
    return out


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attention_is_its_definition(window: int | None, softcap: float | None) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((4, 6, 8))
    k, v = rng.standard_normal((2, 7, 2, 8))
    expected = attention_by_loops(q, k, v, 0.4, window, softcap)
    actual = reference.attention(q, k, v, scale=0.4, sliding_window=window, softcap=softcap)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_rotation_is_complex_multiplication() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 3, 16))
    angle = rng.uniform(0, 6, (5, 8))
    rotated = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * angle)[:, None]
    expected = np.concatenate([rotated.real, rotated.imag], axis=-1)
    np.testing.assert_allclose(reference.rotate(x, np.cos(angle), np.sin(angle)), expected, rtol=1e-12)


def test_paging_is_invisible() -> None:
    rng = np.random.default_rng(2)
    heads, kv_heads, dim, size, length = 4, 2, 8, 4, 11
    qkv = rng.standard_normal((length, (heads + 2 * kv_heads) * dim))
    angle = rng.uniform(0, 6, (length, dim // 2))
    cos, sin = np.cos(angle), np.sin(angle)
    tokens = qkv.reshape(length, -1, dim)
    expected = reference.attention(
        reference.rotate(tokens[:, :heads], cos, sin),
        reference.rotate(tokens[:, heads:-kv_heads], cos, sin),
        tokens[:, -kv_heads:],
        scale=0.3,
    ).reshape(length, -1)
    caches = np.full((2, 5, kv_heads, size, dim), np.nan)
    tables = np.array([[4, 0, 2]], np.int32)
    parts = []
    for start, stop in ((0, 6), (6, 7), (7, 11)):
        parts.append(
            reference.paged_attention(
                qkv[start:stop], *caches, np.array([0, stop - start], np.int32), np.array([stop], np.int32),
                tables, cos, sin, scale=0.3,
            )
        )  # fmt: skip
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-12)
