"""Random steps over a paged cache, run by the CPU kernels and by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from engine_runtime.kernels import reference
from engine_runtime.kernels.cpu import (
    KvCache,
    PagedAttention,
    StepLayout,
    allocate_kv_cache,
    supports_float16,
)

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Geometry:
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 16

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class Share:
    """Tokens [start, start + count) of the sequence number ``sequence``."""

    sequence: int
    start: int
    count: int


@dataclass
class World:
    """Sequences with random q, k, v, and a pool of blocks in random order. Unwritten slots hold NaN."""

    geometry: Geometry
    lengths: Sequence[int]
    seed: int = 0
    scale: float = 0.125
    sliding_window: int | None = None
    softcap: float | None = None
    dtype: npt.DTypeLike = np.float32
    qkv: list[FloatArray] = field(init=False)
    block_tables: npt.NDArray[np.int32] = field(init=False)
    cache: KvCache = field(init=False)

    def __post_init__(self) -> None:
        if self.dtype == np.float16 and not supports_float16():
            pytest.skip("this processor cannot convert float16")
        rng = np.random.default_rng(self.seed)
        geometry = self.geometry
        self.qkv = [rng.standard_normal((n, geometry.qkv_size)).astype(np.float32) for n in self.lengths]
        width = -(-max(self.lengths) // geometry.block_size)
        num_blocks = width * len(self.lengths) + 1
        blocks = rng.permutation(num_blocks)[: width * len(self.lengths)]
        self.block_tables = blocks.reshape(-1, width).astype(np.int32)
        angles = rng.uniform(0, 2 * np.pi, (max(self.lengths), geometry.head_dim // 2))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.cache = allocate_kv_cache(
            1, num_blocks, geometry.block_size, geometry.num_kv_heads, geometry.head_dim, self.dtype
        )
        self.clear()

    def clear(self) -> None:
        self.cache.layers[0].view(self.dtype)[:] = np.nan

    def layout(self, shares: Sequence[Share]) -> StepLayout:
        """Entries of the block tables past the contexts name a block that does not exist."""
        size = self.geometry.block_size
        tables = np.full((len(shares), self.block_tables.shape[1] + 1), 2**30, np.int32)
        for row, share in enumerate(shares):
            needed = -(-(share.start + share.count) // size)
            tables[row, :needed] = self.block_tables[share.sequence, :needed]
        return StepLayout(
            np.cumsum([0] + [share.count for share in shares], dtype=np.int32),
            np.array([share.start + share.count for share in shares], np.int32),
            tables,
        )

    def tokens(self, shares: Sequence[Share]) -> FloatArray:
        return np.concatenate([self.qkv[s.sequence][s.start : s.start + s.count] for s in shares])

    def step(self, shares: Sequence[Share]) -> list[FloatArray]:
        """Runs one step; returns each share's output. An element that is not written stays NaN."""
        qkv = self.tokens(shares)
        out = np.full((len(qkv), self.geometry.num_heads * self.geometry.head_dim), np.nan, np.float32)
        PagedAttention()(
            qkv,
            self.cache.layer(0),
            self.layout(shares),
            self.cos,
            self.sin,
            out,
            scale=self.scale,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
        )
        return np.split(out, np.cumsum([share.count for share in shares])[:-1])

    def whole(self) -> list[FloatArray]:
        """Every sequence in one step of its own, in an empty cache."""
        outputs = []
        for sequence, length in enumerate(self.lengths):
            self.clear()
            outputs += self.step([Share(sequence, 0, length)])
        self.clear()
        return outputs

    def reference(self) -> list[npt.NDArray[np.float64]]:
        """Every sequence without a cache, in float64 but for the rounding of what the cache holds."""
        geometry = self.geometry
        outputs = []
        for qkv in self.qkv:
            heads = qkv.reshape(len(qkv), -1, geometry.head_dim)
            cos, sin = self.cos[: len(qkv)], self.sin[: len(qkv)]
            keys = reference.rotate(heads[:, geometry.num_heads : -geometry.num_kv_heads], cos, sin)
            output = reference.attention(
                reference.rotate(heads[:, : geometry.num_heads], cos, sin),
                keys.astype(self.dtype),
                heads[:, -geometry.num_kv_heads :].astype(self.dtype),
                scale=self.scale,
                sliding_window=self.sliding_window,
                softcap=self.softcap,
            )
            outputs.append(output.reshape(len(qkv), -1))
        return outputs


def random_schedule(rng: np.random.Generator, lengths: Sequence[int]) -> list[list[Share]]:
    """Steps that compute all tokens of all sequences, in chunks of random sizes and in random company."""
    done = [0] * len(lengths)
    steps = []
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        shares = []
        for sequence in rng.permutation(len(lengths)):
            left = lengths[sequence] - done[sequence]
            if left and rng.random() < 0.7:
                count = int(min(left, rng.choice([1, 1, 2, 7, 16, 33, left])))
                shares.append(Share(int(sequence), done[sequence], count))
                done[sequence] += count
        if shares:
            steps.append(shares)
    return steps
