"""Random steps for the GPU's attention kernels, with what exact arithmetic makes of them.

The same cases run in Triton's interpreter and on a GPU: ``Memory`` is where their arrays lie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from engine_runtime.kernels import reference
from engine_runtime.kernels.attention_layout import BLOCK_SIZE
from engine_runtime.kernels.gpu_attention import AttentionShape, DecodeBatch, PagedAttention
from engine_runtime.kernels.widened_cache import Widening

Array = npt.NDArray[Any]
NUMPY_TYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp8": ml_dtypes.float8_e4m3fn}


class Memory(Protocol):
    """Memory that kernels reach. ``get`` waits for them."""

    @property
    def stream(self) -> Any: ...

    def put(self, array: Array) -> int: ...

    def get(self, address: int, like: Array) -> Array: ...


@dataclass(frozen=True)
class Sequence:
    """``query_len`` tokens of this step, the last of ``context_len``; 0 and 0: padding."""

    query_len: int
    context_len: int


@dataclass
class AttentionCase:
    """The first ``num_decode`` sequences take ``decode``, the others ``prefill``.

    Attributes:
        is_exact: nothing is rotated, and keys and values need no rounding to be cached.
        expected: float64 [num_tokens, num_heads * head_dim].
        expected_cache: float64 [num_blocks, 2, num_kv_heads, block_size, head_dim], scales applied.
        is_widened: whether the last ``run`` widened contexts.
    """

    shape: AttentionShape
    sequences: list[Sequence]
    num_decode: int
    window: int | None = None
    has_sinks: bool = False
    k_scale: float = 1.0
    v_scale: float = 1.0
    seed: int = 0
    sharpness: float = 1.0
    is_exact: bool = False
    qkv: Array = field(init=False)
    cache: Array = field(init=False)
    expected: Array = field(init=False)
    expected_cache: Array = field(init=False)
    is_widened: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        shape = self.shape
        rng = np.random.default_rng(self.seed)
        dtype = NUMPY_TYPES[shape.dtype]
        cache_type = NUMPY_TYPES["fp8" if shape.kv_dtype == "fp8" else shape.dtype]
        dim, kv_heads = shape.head_dim, shape.num_kv_heads
        contexts = np.array([sequence.context_len for sequence in self.sequences])
        counts = np.array([sequence.query_len for sequence in self.sequences])
        self.num_tokens = int(counts.sum())
        self.query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.context_len = contexts.astype(np.int32)
        used = -(-contexts // BLOCK_SIZE)
        self.num_blocks = int(used.sum()) + 2
        self.block_tables = np.full((len(counts), int(used.max(initial=0)) + 1), 2**30, np.int32)
        free = iter(rng.permutation(self.num_blocks))
        for sequence, count in enumerate(used):
            self.block_tables[sequence, :count] = [next(free) for _ in range(count)]
        size = (self.num_tokens, shape.num_heads + 2 * kv_heads, dim)
        qkv = rng.standard_normal(size, np.float32)
        qkv[:, : shape.num_heads] *= self.sharpness
        turn = 2 * math.pi
        if self.is_exact:
            turn = 0.0
            scales = np.repeat([self.k_scale, self.v_scale], kv_heads)[:, None]
            qkv[:, shape.num_heads :] = (qkv[:, shape.num_heads :] / scales).astype(cache_type) * scales
        self.qkv = qkv.astype(dtype)
        angles = rng.uniform(0, turn, (int(contexts.max(initial=1)), dim // 2))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.sinks = rng.standard_normal(shape.num_heads).astype(np.float32) if self.has_sinks else None

        scales = np.array([self.k_scale, self.v_scale])[:, None, None, None]
        old = rng.standard_normal((self.num_blocks, 2, kv_heads, BLOCK_SIZE, dim), np.float32)
        self.cache = (old / scales).astype(cache_type)
        self.positions = np.zeros(self.num_tokens, np.int32)
        self.slots = np.full(self.num_tokens, -1, np.int32)
        after = self.cache.astype(np.float64)
        self.expected = np.empty((self.num_tokens, shape.num_heads * dim))
        for s, sequence in enumerate(self.sequences):
            if sequence.query_len == 0:
                continue
            rows = slice(self.query_start[s], self.query_start[s + 1])
            positions = np.arange(sequence.context_len - sequence.query_len, sequence.context_len)
            tokens = self.qkv[rows].astype(np.float64)
            self.positions[rows] = positions
            if sequence.query_len > sequence.context_len:  # no context at all
                self.positions[rows] = 0
                self.expected[rows] = 0.0
                continue
            blocks, places = self.block_tables[s, positions // BLOCK_SIZE], positions % BLOCK_SIZE
            self.slots[rows] = blocks * BLOCK_SIZE + places
            cos, sin = self.cos[positions], self.sin[positions]
            q = reference.rotate(tokens[:, : shape.num_heads], cos, sin).astype(dtype)
            k = reference.rotate(tokens[:, shape.num_heads : -kv_heads], cos, sin)
            v = tokens[:, -kv_heads:]
            for part, values, scale in ((0, k, self.k_scale), (1, v, self.v_scale)):
                after[blocks, part, :, places] = (values / scale).astype(np.float32).astype(cache_type)
            everything = np.arange(sequence.context_len)
            blocks, places = self.block_tables[s, everything // BLOCK_SIZE], everything % BLOCK_SIZE
            output = reference.attention(
                q.astype(np.float64),
                after[blocks, 0, :, places] * self.k_scale,
                after[blocks, 1, :, places] * self.v_scale,
                scale=shape.scale,
                sliding_window=self.window,
                softcap=shape.softcap,
                sinks=self.sinks,
            )
            self.expected[rows] = output.reshape(sequence.query_len, -1)
        self.expected_cache = after * scales

    def run(self, attention: PagedAttention, memory: Memory, num_plans: int = 1) -> tuple[Array, Array]:
        """Returns output and cache, float64, scales applied; workspace and output are poisoned before.

        Args:
            num_plans: how often all is done, on the same workspace.
        """
        stream = memory.stream
        workspace = memory.put(np.full(attention.workspace_bytes, 0xFF, np.uint8))
        attention.use_workspace(workspace, stream)
        cache = memory.put(self.cache)
        layer = attention.kv_layer(cache, self.num_blocks, k_scale=self.k_scale, v_scale=self.v_scale)
        tables = memory.put(self.block_tables)
        table_stride = self.block_tables.shape[1]
        cos, sin = memory.put(self.cos), memory.put(self.sin)
        sinks = 0 if self.sinks is None else memory.put(self.sinks)
        positions, slots = memory.put(self.positions), memory.put(self.slots)
        query_start, context_len = memory.put(self.query_start), memory.put(self.context_len)
        out = np.full(self.expected.shape, np.nan, self.qkv.dtype)
        tiles = attention.prefill_tiles(self.query_start, self.context_len, self.num_decode)
        assert len(tiles) <= attention.max_prefill_tiles(self.num_tokens, len(self.sequences))
        padded_tiles = np.concatenate([tiles, np.full((2, tiles.shape[1]), -1, np.int32)])
        tiles_address = memory.put(padded_tiles)
        batch = DecodeBatch(self.num_decode, query_start, context_len, tables, table_stride)
        starts = attention.widened_starts(self.query_start, self.context_len, self.num_decode)
        self.is_widened = len(starts) > 0
        widening = None
        if self.is_widened:
            most_blocks = -(-int(self.context_len[self.num_decode :].max()) // BLOCK_SIZE)
            widening = Widening(
                self.num_decode, len(starts), most_blocks, memory.put(starts), query_start, context_len
            )
        for _ in range(num_plans):
            out_address = memory.put(out)
            qkv = memory.put(self.qkv)
            if self.num_decode:
                attention.plan_decode(stream, batch)
            attention.write_rope(stream, qkv, self.num_tokens, layer, positions, slots, cos, sin)
            if self.num_decode:
                attention.decode(stream, qkv, out_address, layer, batch, window=self.window, sinks=sinks)
            if self.num_decode < len(self.sequences):
                attention.prefill(
                    stream, qkv, out_address, layer, tiles_address, len(padded_tiles), tables, table_stride,
                    window=self.window, sinks=sinks, widening=widening,
                )  # fmt: skip
        result = memory.get(out_address, out).astype(np.float64)
        scales = np.array([self.k_scale, self.v_scale])[:, None, None, None]
        return result, memory.get(cache, self.cache).astype(np.float64) * scales

    def check(self, attention: PagedAttention, memory: Memory, num_plans: int = 1) -> None:
        """Compares both with what is expected."""
        result, cache = self.run(attention, memory, num_plans)
        # One unit in the last place: products of the rotation are rounded in another order.
        ulp = {"bf16": 2**-7, "fp16": 2**-10}[self.shape.dtype] if self.shape.kv_dtype == "same" else 2**-3
        np.testing.assert_allclose(cache, self.expected_cache, rtol=ulp, atol=ulp / 8)
        tolerance = {"bf16": 1e-2, "fp16": 2e-3}[self.shape.dtype]
        if self.shape.kv_dtype == "fp8":
            tolerance = 2e-2  # keys at the edge of two roundings
        for s in range(len(self.sequences)):
            rows = slice(self.query_start[s], self.query_start[s + 1])
            want = self.expected[rows]
            error = np.linalg.norm(result[rows] - want)  # NaN: not all was written
            assert error <= tolerance * np.linalg.norm(want), (
                s, self.sequences, self.num_decode, self.shape, self.window, error, np.linalg.norm(want),
                np.isnan(result[rows]).nonzero(),
            )  # fmt: skip


def random_case(seed: int, **fixed: Any) -> AttentionCase:
    """A mixture of decodes, chunks with and without a cached prefix, and padding."""
    rng = np.random.default_rng(seed)

    def pick(name: str, *choices: Any) -> Any:
        return fixed[name] if name in fixed else choices[rng.integers(len(choices))]

    head_dim = pick("head_dim", 64, 80, 96, 128, 256)
    group, num_kv_heads = pick("group", 1, 3, 4, 7, 8, 16), pick("num_kv_heads", 1, 2, 3)
    softcap = pick("softcap", None, None, 3.0) if head_dim in (128, 256) else None
    shape = AttentionShape(
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=pick("dtype", "bf16", "fp16"),
        kv_dtype=pick("kv_dtype", "same", "fp8"),
        scale=head_dim**-0.5,
        softcap=softcap,
    )
    longest = fixed.get("longest", 1200)
    sequences = []
    for _ in range(int(rng.integers(0, fixed.get("max_decodes", 9)))):
        context = int(rng.choice([1, 2, 63, 64, 65, 128, int(rng.integers(1, longest))]))
        sequences.append(Sequence(min(context, int(rng.integers(1, 16 // group + 1))), context))
    sequences += [Sequence(1, 0)] * int(rng.integers(2)) + [Sequence(0, 0)] * int(rng.integers(3))
    num_decode = len(sequences)
    has_tokens = any(sequence.query_len for sequence in sequences)
    for _ in range(int(rng.integers(0 if has_tokens else 1, fixed.get("max_prefills", 5)))):
        count = int(rng.choice([1, 31, 32, 33, 64, 100, int(rng.integers(1, longest // 2))]))
        cached = int(rng.choice([0, 0, 64, 100, int(rng.integers(0, longest // 2))]))
        sequences.append(Sequence(count, min(count + cached, longest)))
    sequences = [Sequence(min(s.query_len, s.context_len or s.query_len), s.context_len) for s in sequences]
    fp8 = shape.kv_dtype == "fp8"
    return AttentionCase(
        shape,
        sequences,
        num_decode,
        window=pick("window", None, None, 1, 5, 64, 100, 500),
        has_sinks=pick("has_sinks", False, False, True),
        k_scale=0.03 if fp8 else 1.0,
        v_scale=0.021 if fp8 else 1.0,
        seed=seed,
        sharpness=pick("sharpness", 1.0, 4.0),
    )


def make_attention(
    library: Any, case: AttentionCase, num_multiprocessors: int, num_widened_blocks: int = 0
) -> PagedAttention:
    return PagedAttention(
        library,
        case.shape,
        max_sequences=max(1, len(case.sequences)),
        num_multiprocessors=num_multiprocessors,
        windows=(None, case.window),
        num_widened_blocks=num_widened_blocks,
        least_widened_queries=1,
    )
