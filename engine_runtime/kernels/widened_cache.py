"""Contexts of an FP8 cache as 16-bit numbers, for as long as one layer's ``prefill`` needs them.

Tensor cores multiply 16-bit queries by 16-bit keys. A kernel that converts each key anew for every tile of
queries spends as long on that as on products; here each is converted once, into memory that all layers share,
and the kernel of a 16-bit cache reads it there. E4M3 is exact in both 16-bit types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_runtime.cuda import Stream
from engine_runtime.kernels.attention_layout import BLOCK_SIZE, KernelDType, kernel_name
from engine_runtime.kernels.kernel_library import Kernel, KernelLibrary
from engine_runtime.kernels.numpy_types import Int32Array

LEAST_QUERIES = 64
"""Of a key, on average: with fewer, converting costs more time than it saves (an H200)."""


@dataclass(frozen=True, slots=True)
class Widening:
    """The sequences of a step whose contexts are widened: all that ``prefill`` takes.

    Attributes:
        first_sequence, num_sequences: rows of the step's arrays.
        most_blocks: of the context of one of them.
        starts: address of ``WidenedCache.starts``.
        query_start, context_len: addresses, as of ``DecodeBatch``.
    """

    first_sequence: int
    num_sequences: int
    most_blocks: int
    starts: int
    query_start: int
    context_len: int


class WidenedCache:
    """Room for the contexts of a step in one layer.

    Attributes:
        sizes: bytes of the two arrays, for ``use_workspace``.
        map: how the reader finds the blocks, see ``Kernel.tensor_map``.
        tables, table_stride: their numbers, as block tables.
    """

    def __init__(
        self,
        library: KernelLibrary,
        reader: Kernel,
        *,
        dtype: KernelDType,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        max_sequences: int,
        least_queries: int = LEAST_QUERIES,
    ) -> None:
        """
        Args:
            reader: any ``prefill_hopper`` of the shape: it makes the tensor map, which is the same for all.
            max_sequences: of a step.
            least_queries: of a key, on average.

        Raises:
            KernelsMissingError: the kernel is not compiled for the device.
        """
        self._kernel = library.get(kernel_name("widen_cache", dtype, "fp8", head_dim))
        self._reader = reader
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._num_blocks = num_blocks
        self._least_queries = least_queries
        self.table_stride = num_blocks
        block_bytes = 2 * num_kv_heads * BLOCK_SIZE * head_dim * 2
        self.sizes = {"widened": num_blocks * block_bytes, "widened_tables": 4 * max_sequences * num_blocks}
        self._blocks = 0
        self.tables = 0
        self.map: tuple[Any, ...] = ()

    def use_workspace(self, blocks: int, tables: int) -> None:
        """Takes the addresses of the two arrays; what they hold does not matter."""
        self._blocks, self.tables = blocks, tables
        rows = self._num_blocks * 2 * self._num_kv_heads * BLOCK_SIZE
        self.map = self._reader.tensor_map("cache", blocks, (rows, self._head_dim), (self._head_dim, 1))

    def starts(self, query_start: Int32Array, context_len: Int32Array, first_sequence: int) -> Int32Array:
        """Where the contexts of a step come to lie, in blocks.

        Args:
            query_start, context_len, first_sequence: as of ``PagedAttention.prefill_tiles``.

        Returns:
            int32 [sequences from the first on]; none if they do not fit, or it would not pay.
        """
        context = context_len[first_sequence:]
        queries = np.diff(query_start[first_sequence:])
        blocks = -(-context // BLOCK_SIZE)
        pairs = int(np.dot(queries.astype(np.int64), context))
        is_worth_it = pairs > 0 and pairs >= self._least_queries * int(context.sum())
        if not is_worth_it or int(blocks.sum()) > self._num_blocks:
            return np.empty(0, np.int32)
        return (np.cumsum(blocks) - blocks).astype(np.int32)

    def enqueue(
        self, stream: Stream, cache: int, block_tables: int, table_stride: int, step: Widening, window: int
    ) -> None:
        """Fills it with contexts of a layer's cache.

        Args:
            window: of the layer; 0: none.
        """
        grid = step.most_blocks, step.num_sequences, 2 * self._num_kv_heads
        self._kernel.launch(
            grid, stream,
            cache, self._blocks, self.tables, step.starts, step.query_start, step.context_len, block_tables,
            step.first_sequence, window, self._num_kv_heads, table_stride, self.table_stride,
        )  # fmt: skip
