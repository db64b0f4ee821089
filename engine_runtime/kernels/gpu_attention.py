"""Paged attention on a GPU: the cache's layout, and the launches of its kernels.

    layer of the cache = [num_blocks, 2, num_kv_heads, block_size, head_dim], keys and then values

Nothing here allocates or waits; every method but ``use_workspace`` can be captured in a CUDA graph. What
changes from step to step lies in device memory: a graph captured for S sequences serves any contexts.

From 9.0 on ``decode``, ``write_rope`` of few tokens and most forms of ``prefill`` start while the launch
before still runs, and wait for its end before they read what it wrote. What describes the step they read at
once. So positions, slots, cosines and sines, ``prefill_tiles`` and block tables must be copied to the device:
what a kernel launched shortly before computes might not be there. The plan is looked after here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_runtime.cuda import Stream
from engine_runtime.kernels.attention_layout import (
    BLOCK_SIZE,
    DECODE_ROWS,
    HEAD_DIMS,
    MAX_SEQUENCES,
    PLAN,
    PLAN_FIELDS,
    SOFTCAP_HEAD_DIMS,
    TILE_FIELDS,
    KernelDType,
    KvDType,
    kernel_name,
)
from engine_runtime.kernels.kernel_library import Kernel, KernelLibrary
from engine_runtime.kernels.numpy_types import Int32Array
from engine_runtime.kernels.widened_cache import LEAST_QUERIES, WidenedCache, Widening

_LOG2_E = 1.4426950408889634
_ALIGNMENT = 256
# Bytes of the cache that a multiprocessor reads (33 KB/µs on an H200) until a program that is alone there has
# its first keys; while the last of several programs finds out that it is the last; and while that one reads
# some parts at once.
_START_BYTES = 48 * 1024
_CUT_BYTES = 45 * 1024
_PARTS_BYTES = 26 * 1024
# Up to here `write_rope` starts early. More programs would all go to the multiprocessors that are free first.
_MOST_EARLY_TOKENS = 64


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What all attentions of a model have in common.

    Attributes:
        head_dim: one of ``HEAD_DIMS``.
        scale: multiplies q . k.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None: they do not.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: KernelDType
    kv_dtype: KvDType
    scale: float
    softcap: float | None = None

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def kv_block_bytes(self) -> int:
        """Of one block in one layer."""
        item = 1 if self.kv_dtype == "fp8" else 2
        return 2 * self.num_kv_heads * BLOCK_SIZE * self.head_dim * item


@dataclass(frozen=True, slots=True)
class GpuKvLayer:
    """The cache of one layer, made by ``PagedAttention.kv_layer``."""

    address: int
    k_scale: float
    v_scale: float
    prefill_cache: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Device addresses of a step's metadata, int32.

    Attributes:
        num_sequences: rows of the arrays, padding included.
        query_start: [num_sequences + 1]: the rows of q of each sequence, rising; none: it is padding.
        context_len: [num_sequences], with the tokens of this step; 0: the output rows, if any, become zero.
        block_tables: [num_sequences, table_stride]; entries past the context are not read.
    """

    num_sequences: int
    query_start: int
    context_len: int
    block_tables: int
    table_stride: int


class _DecodeForm:
    """One of the two decoding kernels, and how contexts are cut for it.

    Attributes:
        extra_tiles: most that contexts are cut into, beyond one for each sequence.
        costs: the last arguments of ``plan_decode``.
    """

    def __init__(
        self, kernel: Kernel, shape: AttentionShape, num_multiprocessors: int, *, is_alone: bool
    ) -> None:
        constexprs = kernel.constexprs
        token_bytes = shape.kv_block_bytes // (shape.num_kv_heads * BLOCK_SIZE)
        parts_at_once = max(int(constexprs["COMBINED"]) // (4 * int(constexprs["BLOCK_D"])), 1)
        self.kernel = kernel
        self.extra_tiles = -(-(2 if is_alone else 4) * num_multiprocessors // shape.num_kv_heads)
        self.costs = (
            int(constexprs["STEP"]), int(is_alone), _START_BYTES // token_bytes, _CUT_BYTES // token_bytes,
            _PARTS_BYTES // parts_at_once // token_bytes,
        )  # fmt: skip


class PagedAttention:
    """The attention kernels for one model on one device.

    Attributes:
        workspace_bytes: device memory to be given to ``use_workspace``.
        tokens_per_tile: most tokens of a tile of ``prefill_tiles``.
        max_decode_len: most tokens a sequence may have in ``decode``.
    """

    block_size = BLOCK_SIZE

    def __init__(
        self,
        library: KernelLibrary,
        shape: AttentionShape,
        *,
        max_sequences: int,
        num_multiprocessors: int,
        windows: Sequence[int | None] = (None,),
        num_widened_blocks: int = 0,
        least_widened_queries: int = LEAST_QUERIES,
    ) -> None:
        """
        Args:
            max_sequences: of one step.
            num_multiprocessors: of the device.
            windows: the sliding windows that layers have; None: a layer without.
            num_widened_blocks: room for contexts of an FP8 cache with 16 bits; used where that is faster.
            least_widened_queries: see ``WidenedCache``.

        Raises:
            ValueError: a shape that no kernel is compiled for.
            KernelsMissingError: the device does not have what the shape needs, such as FP8.
        """
        group = shape.num_heads // shape.num_kv_heads
        if shape.head_dim not in HEAD_DIMS:
            raise ValueError(
                f"head_dim {shape.head_dim} is not among {HEAD_DIMS}, which the GPU kernels have"
            )
        if shape.softcap is not None and shape.head_dim not in SOFTCAP_HEAD_DIMS:
            raise ValueError(f"no GPU kernel has a softcap with head_dim {shape.head_dim}")
        if group * shape.num_kv_heads != shape.num_heads or group > DECODE_ROWS:
            raise ValueError(
                f"{shape.num_heads} query heads over {shape.num_kv_heads} KV heads: the GPU kernels need "
                f"a whole number of at most {DECODE_ROWS} query heads a KV head"
            )
        if not 1 <= max_sequences <= MAX_SEQUENCES:
            raise ValueError(f"max_sequences is {max_sequences}; expected 1 to {MAX_SEQUENCES}")
        self.shape = shape
        self._group = group
        names = (shape.dtype, shape.kv_dtype, shape.head_dim)
        has_softcap = shape.softcap is not None
        self._rope_cache = library.get(kernel_name("rope_cache", *names))
        hopper = [
            kernel_name("prefill_hopper", shape.dtype, "same", shape.head_dim, has_softcap, has_window)
            for has_window in (False, True)
        ]
        # Without and with a window, for one tensor map; none: the device has no such kernels.
        self._hopper = [library.get(name) for name in hopper] if hopper[0] in library else []
        self._is_hopper = bool(self._hopper) and shape.kv_dtype == "same"
        self._widened: WidenedCache | None = None
        if self._is_hopper:
            self._prefill = self._hopper[0]
        else:
            self._prefill = library.get(kernel_name("prefill_attention", *names, has_softcap))
        if self._hopper and shape.kv_dtype == "fp8" and num_widened_blocks:
            self._widened = WidenedCache(
                library, self._hopper[0],
                dtype=shape.dtype, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
                num_blocks=num_widened_blocks, max_sequences=max_sequences,
                least_queries=least_widened_queries,
            )  # fmt: skip
        self._many = _DecodeForm(
            library.get(kernel_name("decode_attention", *names, has_softcap)),
            shape, num_multiprocessors, is_alone=False,
        )  # fmt: skip
        self._few = self._many
        few = kernel_name("decode_few", *names, has_softcap)
        if few in library:
            self._few = _DecodeForm(library.get(few), shape, num_multiprocessors, is_alone=True)
        self._plan = library.get(PLAN)
        self._is_plan_new = False  # nothing was launched since: ``decode`` would read it too early
        self.tokens_per_tile = int(self._prefill.constexprs["ROWS"]) // group
        self.max_decode_len = DECODE_ROWS // group
        heads = int(self._rope_cache.constexprs["HEADS"])
        self._rope_programs = -(-(shape.num_heads + 2 * shape.num_kv_heads) // heads)
        self._num_multiprocessors = num_multiprocessors
        self._windows = {window: index for index, window in enumerate(dict.fromkeys(windows))}

        max_tiles = max_sequences + max(self._few.extra_tiles, self._many.extra_tiles)
        units = max_tiles * shape.num_kv_heads
        padded = int(self._many.kernel.constexprs["BLOCK_D"])
        sizes = {
            "partial": units * DECODE_ROWS * padded * 4,
            "stats": units * 2 * DECODE_ROWS * 4,
            "arrivals": max_sequences * shape.num_kv_heads * 4,
            "plans": len(self._windows) * max_tiles * PLAN_FIELDS * 4,
            **(self._widened.sizes if self._widened is not None else {}),
        }
        self._max_sequences = max_sequences
        self._plan_bytes = max_tiles * PLAN_FIELDS * 4
        self._offsets: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self._offsets[name] = end
            end = -(-(end + size) // _ALIGNMENT) * _ALIGNMENT
        self.workspace_bytes = end
        self._addresses = dict.fromkeys(self._offsets, 0)

    def use_workspace(self, address: int, stream: Stream) -> None:
        """Takes ``workspace_bytes`` at a multiple of 256; they may be shared by what runs before or after a
        ``decode``, except for the first use, ordered by ``stream``."""
        self._addresses = {name: address + offset for name, offset in self._offsets.items()}
        size = self._max_sequences * self.shape.num_kv_heads * 4
        stream.fill(self._addresses["arrivals"], 0, size)
        if self._widened is not None:
            self._widened.use_workspace(self._addresses["widened"], self._addresses["widened_tables"])

    def kv_layer(
        self, address: int, num_blocks: int, *, k_scale: float = 1.0, v_scale: float = 1.0
    ) -> GpuKvLayer:
        """Describes the cache of a layer: ``num_blocks * shape.kv_block_bytes`` bytes at a multiple of 256.

        They must be zero before the first use: slots that hold nothing are multiplied by zero.

        Args:
            k_scale, v_scale: what the entries of an FP8 cache are multiplied with; 1 otherwise.
        """
        cache: tuple[Any, ...] = (address,)
        if self._is_hopper:
            shape = self.shape
            rows = num_blocks * 2 * shape.num_kv_heads * BLOCK_SIZE
            cache = self._prefill.tensor_map("cache", address, (rows, shape.head_dim), (shape.head_dim, 1))
        return GpuKvLayer(address, k_scale, v_scale, cache)

    def write_rope(
        self, stream: Stream, qkv: int, num_tokens: int, layer: GpuKvLayer, positions: int, slots: int,
        cos: int, sin: int,
    ) -> None:  # fmt: skip
        """Rotates the queries in ``qkv`` in place; rotates the keys and writes keys and values to the cache.

        Args:
            qkv: [num_tokens, shape.qkv_size], at least one: query heads, key heads, value heads.
            positions: int32 [num_tokens], below the length of the tables.
            slots: int32 [num_tokens]: block * block_size + place in the block; -1: the token is padding and
                not cached.
            cos, sin: float32 [max_len, head_dim / 2], see ``engine_runtime.rope.rope_tables``.
        """
        shape = self.shape
        kernel = self._rope_cache
        launch = kernel.launch_early if num_tokens <= _MOST_EARLY_TOKENS else kernel.launch
        self._is_plan_new = False
        launch(
            (num_tokens, self._rope_programs, 1), stream,
            qkv, qkv, layer.address, positions, slots, cos, sin, 1.0 / layer.k_scale, 1.0 / layer.v_scale,
            shape.num_heads, shape.num_kv_heads, shape.qkv_size, shape.qkv_size,
        )  # fmt: skip

    def plan_decode(self, stream: Stream, batch: DecodeBatch) -> None:
        """Cuts the contexts into equal parts: once a step, before the ``decode`` of its layers.

        Raises:
            ValueError: more sequences than ``max_sequences``.
        """
        if batch.num_sequences > self._max_sequences:
            raise ValueError(
                f"{batch.num_sequences} sequences, and the workspace is for {self._max_sequences}"
            )
        form = self._decode_form(batch)
        self._is_plan_new = True
        for window, index in self._windows.items():
            self._plan.launch(
                (1, 1, 1), stream,
                batch.query_start, batch.context_len, self._addresses["plans"] + index * self._plan_bytes,
                batch.num_sequences, batch.num_sequences + form.extra_tiles, window or 0,
                self.shape.num_kv_heads, self._num_multiprocessors, *form.costs,
            )  # fmt: skip

    def decode(
        self, stream: Stream, qkv: int, out: int, layer: GpuKvLayer, batch: DecodeBatch, *,
        window: int | None = None, sinks: int = 0,
    ) -> None:  # fmt: skip
        """Attention of sequences of at most ``max_decode_len`` tokens, whose keys and values are written.

        Args:
            qkv: as ``write_rope`` left it.
            out: [tokens, num_heads * head_dim].
            window: one of ``windows``: a token sees itself and the ``window - 1`` tokens before it.
            sinks: float32 [num_heads], a logit a head that takes part in the softmax only; 0: none.
        """
        shape, addresses = self.shape, self._addresses
        plan = addresses["plans"] + self._windows[window] * self._plan_bytes
        form = self._decode_form(batch)
        launch = form.kernel.launch if self._is_plan_new else form.kernel.launch_early
        self._is_plan_new = False
        launch(
            (shape.num_kv_heads, batch.num_sequences + form.extra_tiles, 1), stream,
            qkv, layer.address, out, plan,
            addresses["partial"], addresses["stats"], addresses["arrivals"],
            *self._common(layer, batch.block_tables, batch.table_stride, window, sinks),
        )  # fmt: skip

    def prefill(
        self, stream: Stream, qkv: int, out: int, layer: GpuKvLayer, tiles: int, num_tiles: int,
        block_tables: int, table_stride: int, *, window: int | None = None, sinks: int = 0,
        widening: Widening | None = None,
    ) -> None:  # fmt: skip
        """Attention of any number of tokens a sequence, whose keys and values are written.

        Args:
            tiles: device copy of ``prefill_tiles``; further ones that begin with -1 are skipped.
            block_tables: int32 [sequences, table_stride].
            widening: of the sequences of the tiles; None: the cache is read as it is.

        The others as of ``decode``.
        """
        cache, is_hopper, is_early = layer.prefill_cache, self._is_hopper, True
        if widening is not None and self._widened is not None:
            self._widened.enqueue(stream, layer.address, block_tables, table_stride, widening, window or 0)
            cache, is_hopper, is_early = self._widened.map, True, False  # its tables are computed just before
            block_tables, table_stride = self._widened.tables, self._widened.table_stride
        common = self._common(layer, block_tables, table_stride, window, sinks)
        num_kv_heads = self.shape.num_kv_heads
        if is_hopper:
            grid = (min(self._num_multiprocessors, num_tiles * num_kv_heads), 1, 1)
            kernel = self._hopper[bool(window)]
            launch = kernel.launch_early if is_early else kernel.launch
            launch(grid, stream, qkv, *cache, out, tiles, *common, num_tiles)
        else:
            grid = (num_kv_heads, num_tiles, 1)
            self._prefill.launch(grid, stream, qkv, *cache, out, tiles, *common)

    def widened_starts(
        self, query_start: Int32Array, context_len: Int32Array, first_sequence: int = 0
    ) -> Int32Array:
        """What ``Widening`` needs of a step, see ``WidenedCache.starts``; empty: no widening."""
        if self._widened is None:
            return np.empty(0, np.int32)
        return self._widened.starts(query_start, context_len, first_sequence)

    def prefill_tiles(
        self, query_start: Int32Array, context_len: Int32Array, first_sequence: int = 0
    ) -> Int32Array:
        """How ``prefill`` shares out its work, longest first.

        Args:
            query_start: int32 [num_sequences + 1].
            context_len: int32 [num_sequences], with the tokens of this step.
            first_sequence: those before it are left out.

        Returns:
            int32 [num_tiles, 4]; at most ``max_prefill_tiles``.
        """
        start = query_start[first_sequence:-1]
        count = query_start[first_sequence + 1 :] - start
        num_tiles = -(-count // self.tokens_per_tile)
        index = np.repeat(np.arange(len(count), dtype=np.int32), num_tiles)
        before = np.cumsum(num_tiles) - num_tiles
        first = (np.arange(len(index), dtype=np.int32) - before[index]) * self.tokens_per_tile
        tiles = np.empty((len(index), TILE_FIELDS), np.int32)
        tiles[:, 0] = index + first_sequence
        tiles[:, 1] = start[index] + first
        tiles[:, 2] = np.minimum(count[index] - first, self.tokens_per_tile)
        tiles[:, 3] = (context_len[first_sequence:] - count)[index] + first
        order = np.argsort(-tiles[:, 3], kind="stable")
        return np.ascontiguousarray(tiles[order])

    def max_prefill_tiles(self, num_tokens: int, num_sequences: int) -> int:
        """Most tiles of a step of so many tokens."""
        return num_tokens // self.tokens_per_tile + num_sequences

    def _decode_form(self, batch: DecodeBatch) -> _DecodeForm:
        is_few = batch.num_sequences * self.shape.num_kv_heads <= self._num_multiprocessors
        return self._few if is_few else self._many

    def _common(
        self, layer: GpuKvLayer, block_tables: int, table_stride: int, window: int | None, sinks: int
    ) -> tuple[int | float, ...]:
        shape = self.shape
        scale = shape.scale * layer.k_scale * _LOG2_E
        cap = 0.0
        if shape.softcap is not None:
            scale *= 2.0 / shape.softcap
            cap = shape.softcap * _LOG2_E
        return (
            block_tables, sinks, scale, cap, layer.v_scale, int(sinks != 0), window or 0, self._group,
            shape.num_kv_heads, shape.qkv_size, shape.num_heads * shape.head_dim, table_stride,
        )  # fmt: skip
