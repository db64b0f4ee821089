"""Paged attention on a CPU: the KV cache, the layout of a step, and attention itself."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine_runtime.kernels.cpu_attention import SCORES_STRIDE, attend, write_kv
from engine_runtime.kernels.cpu_simd import LANES, has_feature
from engine_runtime.kernels.numpy_types import Float32Array, Int32Array, KvArray

ROWS_PER_TILE = 24
NO_WINDOW = 1 << 30


@dataclass(frozen=True)
class KvCache:
    """Keys and values of all layers. Memory is taken from the system as blocks are first written.

    Attributes:
        layers: one array [num_blocks * num_kv_heads * block_size * (head_dim + value_dim)] a layer: float32,
            or uint16 with the bits of float16. ``cpu_attention`` draws a block.
    """

    layers: tuple[KvArray, ...]
    block_size: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def layer(self, index: int) -> KvLayer:
        return KvLayer(self.layers[index], self.block_size, self.num_kv_heads, self.head_dim)


@dataclass(frozen=True, slots=True)
class KvLayer:
    """The cache of one layer."""

    data: KvArray
    block_size: int
    num_kv_heads: int
    head_dim: int

    def keys(self) -> Float32Array:
        """A copy as [num_blocks, num_kv_heads, block_size, head_dim]."""
        size = self.block_size * self.head_dim
        keys = self._heads()[:, :, :size].reshape(-1, self.num_kv_heads, self.head_dim, self.block_size)
        return np.ascontiguousarray(keys.transpose(0, 1, 3, 2))

    def values(self) -> Float32Array:
        """A copy as [num_blocks, num_kv_heads, block_size, head_dim]."""
        size = self.block_size * self.head_dim
        values = self._heads()[:, :, size:]
        values = values.reshape(-1, self.num_kv_heads, self.block_size, padded_head_dim(self.head_dim))
        return np.ascontiguousarray(values[..., : self.head_dim])

    def _heads(self) -> Float32Array:
        width = self.block_size * (self.head_dim + padded_head_dim(self.head_dim))
        data = self.data if self.data.dtype == np.float32 else self.data.view(np.float16)
        return data.reshape(-1, self.num_kv_heads, width).astype(np.float32)


def padded_head_dim(head_dim: int) -> int:
    """``head_dim`` rounded up to whole vectors: the width of a value row in the cache."""
    return -(-head_dim // LANES) * LANES


def supports_float16() -> bool:
    """Whether the processor converts float16 (F16C, since 2012), so that a cache may be float16."""
    return has_feature("f16c")


def multiplies_int8_exactly() -> bool:
    """Whether sums of uint8 x int8 products are exact.

    On x86 that takes VNNI: without it, ONNX Runtime adds pairs of products in 16 bits, which saturate
    (maddubs). Other processors have no such instruction.
    """
    return (
        platform.machine().lower() not in ("x86_64", "amd64")
        or has_feature("avx512vnni")
        or has_feature("avxvnni")
    )


def kv_block_bytes(
    block_size: int, num_kv_heads: int, head_dim: int, dtype: npt.DTypeLike = np.float32
) -> int:
    """Bytes of one block in one layer."""
    size = block_size * num_kv_heads * (head_dim + padded_head_dim(head_dim))
    return size * np.dtype(dtype).itemsize


def allocate_kv_cache(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: npt.DTypeLike = np.float32,
) -> KvCache:
    """Reserves address space for the cache; no memory is committed before a block is written.

    Args:
        dtype: float32, or float16, which halves the memory that decoding waits for. Keys and values are
            rounded to it as they are written (beyond 65504 to infinity, and their sequence comes out as NaN);
            all arithmetic stays float32.

    Raises:
        RuntimeError: float16 on a processor that cannot convert it.
        ValueError: ``block_size`` is not a multiple of 16, ``head_dim`` not a multiple of 8 from 8 to 256, or
            ``dtype`` another one.
        MemoryError: the system refuses the address space.
    """
    if block_size <= 0 or block_size % LANES:
        raise ValueError(f"block_size must be a multiple of {LANES}, not {block_size}")
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(f"head_dim must be a multiple of 8 from 8 to 256, not {head_dim}")
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float16):
        raise ValueError(f"the cache must be float32 or float16, not {dtype}")
    if dtype == np.float16 and not supports_float16():
        raise RuntimeError("this processor cannot convert float16 (F16C is missing): use a float32 KV cache")
    size = num_blocks * kv_block_bytes(block_size, num_kv_heads, head_dim, dtype) // dtype.itemsize
    if dtype == np.float16:
        return KvCache(
            tuple(np.empty(size, np.uint16) for _ in range(num_layers)), block_size, num_kv_heads, head_dim
        )
    layers = tuple(np.empty(size, np.float32) for _ in range(num_layers))
    return KvCache(layers, block_size, num_kv_heads, head_dim)


class StepLayout:
    """Which tokens a step computes, and where their sequences keep keys and values; the same in all layers.

    Sequence s computes the rows query_start[s] .. query_start[s + 1] - 1 of the step. They are the last
    tokens of context_len[s], so row r stands at position context_len[s] - query_start[s + 1] + r.

    Args:
        query_start: int32 [num_sequences + 1], from 0 to the number of tokens, strictly rising.
        context_len: int32 [num_sequences], tokens of the sequence including those of this step.
        block_tables: int32 [num_sequences, max_blocks]; entry i holds positions i * block_size and following.
            Entries past the context are not read.

    Raises:
        ValueError: shapes, dtypes or counts that contradict each other.
    """

    def __init__(self, query_start: Int32Array, context_len: Int32Array, block_tables: Int32Array) -> None:
        self.query_start = np.ascontiguousarray(query_start, np.int32)
        self.context_len = np.ascontiguousarray(context_len, np.int32)
        self.block_tables = np.ascontiguousarray(block_tables, np.int32)
        self.num_sequences = len(self.context_len)
        self.query_len = np.diff(self.query_start)
        if self.query_start.shape != (self.num_sequences + 1,) or self.query_start[0] != 0:
            raise ValueError("query_start must have num_sequences + 1 entries, from 0")
        if self.block_tables.ndim != 2 or len(self.block_tables) != self.num_sequences:
            raise ValueError("block_tables must be [num_sequences, max_blocks]")
        if (self.query_len < 1).any() or (self.query_len > self.context_len).any():
            raise ValueError("a sequence must compute between one token and its whole context")
        self.num_tokens = int(self.query_start[-1])
        self.max_context_len = int(self.context_len.max(initial=0))
        self._tiles: dict[int, Int32Array] = {}

    def check_blocks(self, num_blocks: int, block_size: int) -> None:
        """Raises ValueError if a block that the step needs is missing or not one of the pool."""
        needed = -(-self.context_len // block_size)
        if self.num_sequences and needed.max() > self.block_tables.shape[1]:
            raise ValueError("a block table is shorter than its context")
        used = np.arange(self.block_tables.shape[1]) < needed[:, None]
        if (used & ((self.block_tables < 0) | (self.block_tables >= num_blocks))).any():
            raise ValueError(f"a block table names a block outside 0..{num_blocks - 1}")

    def tiles(self, group: int) -> Int32Array:
        """int32 [num_tiles, 3]: (sequence, first token, last token + 1), for ``group`` heads a KV head."""
        tiles = self._tiles.get(group)
        if tiles is None:
            step = max(1, ROWS_PER_TILE // group)
            tiles = np.array(
                [
                    (sequence, first, min(first + step, count))
                    for sequence, count in enumerate(self.query_len.tolist())
                    for first in range(0, count, step)
                ],
                np.int32,
            ).reshape(-1, 3)
            self._tiles[group] = tiles
        return tiles


class PagedAttention:
    """Runs attention layer by layer. Holds scratch memory: use one object a thread."""

    def __init__(self) -> None:
        self._scratch: dict[tuple[int, int], tuple[Float32Array, ...]] = {}

    def _scratch_for(self, rows: int, value_dim: int) -> tuple[Float32Array, ...]:
        """The rotated queries, scores, outputs, maxima and sums of one tile."""
        key = rows, value_dim
        if key not in self._scratch:
            sizes = (rows * value_dim, rows * SCORES_STRIDE, rows * value_dim, rows, rows)
            self._scratch[key] = tuple(np.empty(size, np.float32) for size in sizes)
        return self._scratch[key]

    def __call__(
        self,
        qkv: Float32Array,
        kv: KvLayer,
        layout: StepLayout,
        cos: Float32Array,
        sin: Float32Array,
        out: Float32Array,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        """Rotates q and k, stores k and v in the cache, and attends, for one layer.

        Args:
            qkv: float32 [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous: q, k and v
                after bias and norm, before the rotary embedding.
            cos, sin: float32 [max_len, head_dim / 2], the halves convention of GPT-NeoX and Llama.
            out: float32 [num_tokens, num_heads * head_dim], contiguous; overwritten.
            scale: multiplies q . k.
            sliding_window: a token sees itself and the ``sliding_window - 1`` tokens before it.
            softcap: scores become ``softcap * tanh(scores / softcap)``.

        Raises:
            ValueError: arrays of other shapes, dtypes or strides; a context longer than ``cos`` and ``sin``.
                Block ids are not checked here: ``StepLayout.check_blocks``.
        """
        head_dim = kv.head_dim
        num_kv_heads = kv.num_kv_heads
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        _check("qkv", qkv, (layout.num_tokens, (num_heads + 2 * num_kv_heads) * head_dim))
        _check("out", out, (layout.num_tokens, num_heads * head_dim))
        _check("cos", cos, (len(cos), head_dim // 2))
        _check("sin", sin, cos.shape)
        if layout.max_context_len > len(cos):
            raise ValueError(f"cos and sin have {len(cos)} positions, {layout.max_context_len} are needed")
        value_dim = padded_head_dim(head_dim)
        group = num_heads // num_kv_heads
        tiles = layout.tiles(group)
        write_kv(
            qkv, kv.data, layout.query_start, layout.context_len, layout.block_tables, cos, sin,
            num_heads, num_kv_heads, head_dim, value_dim, kv.block_size, 0, layout.num_sequences,
        )  # fmt: skip
        attend(
            qkv, kv.data, layout.query_start, layout.context_len, layout.block_tables, cos, sin,
            num_heads, num_kv_heads, head_dim, value_dim, kv.block_size,
            scale, sliding_window or NO_WINDOW, softcap or 0.0, tiles, 0, len(tiles) * num_kv_heads,
            *self._scratch_for(max(ROWS_PER_TILE, group), value_dim), out,
        )  # fmt: skip


def _check(name: str, array: Float32Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype != np.float32 or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be contiguous float32 {list(shape)}, not {array.dtype} {list(array.shape)}"
        )
