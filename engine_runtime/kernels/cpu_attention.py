"""Rotary embedding, KV cache write and paged attention on a CPU: the compiled part.

A block of the cache holds, for each KV head, the keys transposed and then the values:

    cache[block, kv_head] = K^T [head_dim, block_size] | V [block_size, value_dim]

so that both products of attention read whole vectors, and 8 KB in a row for 16 tokens of head_dim 64. ``value_dim``
is head_dim rounded up to whole vectors; the padding is written as zeros.

The query heads that share a KV head are rows of one matrix, so K and V are read once for all of them, and a prefill
chunk is cut into tiles of about 24 rows. Each tile runs over its keys in chunks that end at multiples of 512 with the
online softmax (arXiv:1805.02867), in units of log2. A row's result is a function of its own q, K and V alone: chunks
and lanes depend on the absolute position of a key, and masked keys only add exact zeros.
"""

from __future__ import annotations

import numpy as np

from engine_runtime.kernels.cpu_compile import kernel
from engine_runtime.kernels.cpu_simd import (
    LANES,
    add,
    at_most,
    divide,
    exp2,
    keep_between,
    load,
    max_lanes,
    maximum,
    multiply,
    splat,
    store,
    subtract,
    sum_lanes,
)
from engine_runtime.kernels.cpu_tiles import MAX_ROWS, MAX_VECTORS, scores_tile, values_tile
from engine_runtime.kernels.numpy_types import Float32Array, Int32Array

KEY_CHUNK = 512
SCORES_STRIDE = KEY_CHUNK + LANES  # not a power of two, which would map all rows to the same cache set
LOG2_E = np.float32(1.4426950408889634)
NEGATIVE_INFINITY = np.float32(-np.inf)
ZERO = np.float32(0.0)
ONE = np.float32(1.0)


@kernel
def write_kv(
    qkv: Float32Array,
    cache: Float32Array,
    query_start: Int32Array,
    context_len: Int32Array,
    block_tables: Int32Array,
    cos: Float32Array,
    sin: Float32Array,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    block_size: int,
    first_sequence: int,
    last_sequence: int,
) -> None:
    """Rotates the keys of the step and stores keys and values in their slots."""
    half = head_dim // 2
    head_stride = block_size * (head_dim + value_dim)
    for sequence in range(first_sequence, last_sequence):
        first = query_start[sequence]
        count = query_start[sequence + 1] - first
        start = context_len[sequence] - count
        for i in range(count):
            position = start + i
            block = np.int64(block_tables[sequence, position // block_size])
            slot = position % block_size
            for head in range(num_kv_heads):
                keys = (block * num_kv_heads + head) * head_stride + slot
                column = (num_heads + head) * head_dim
                for c in range(half):
                    x = qkv[first + i, column + c]
                    y = qkv[first + i, column + half + c]
                    cache[keys + c * block_size] = x * cos[position, c] - y * sin[position, c]
                    cache[keys + (half + c) * block_size] = y * cos[position, c] + x * sin[position, c]
                values = (
                    (block * num_kv_heads + head) * head_stride + head_dim * block_size + slot * value_dim
                )
                column = (num_heads + num_kv_heads + head) * head_dim
                for c in range(head_dim):
                    cache[values + c] = qkv[first + i, column + c]
                for c in range(head_dim, value_dim):
                    cache[values + c] = ZERO


@kernel
def attend(
    qkv: Float32Array,
    cache: Float32Array,
    query_start: Int32Array,
    context_len: Int32Array,
    block_tables: Int32Array,
    cos: Float32Array,
    sin: Float32Array,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    block_size: int,
    scale: float,
    sliding_window: int,
    softcap: float,
    tiles: Int32Array,
    first_unit: int,
    last_unit: int,
    q: Float32Array,
    scores: Float32Array,
    outputs: Float32Array,
    maxima: Float32Array,
    sums: Float32Array,
    out: Float32Array,
) -> None:
    """Attention of units ``first_unit`` to ``last_unit - 1``; unit u is KV head u % num_kv_heads of tile u // num_kv_heads.

    A tile is a row (sequence, first token, last token + 1) of ``tiles``, in tokens of the sequence's share of the step.
    """
    half = head_dim // 2
    group = num_heads // num_kv_heads
    head_stride = block_size * (head_dim + value_dim)
    block_stride = num_kv_heads * head_stride
    max_blocks = block_tables.shape[1]
    factor = np.float32(scale) if softcap > 0.0 else np.float32(scale) * LOG2_E
    for unit in range(first_unit, last_unit):
        tile = unit // num_kv_heads
        head = unit % num_kv_heads
        sequence = np.int64(tiles[tile, 0])
        first = np.int64(tiles[tile, 1])
        tokens = np.int64(tiles[tile, 2]) - first
        first_row = query_start[sequence] + first
        computed = context_len[sequence] - (query_start[sequence + 1] - query_start[sequence])
        position = computed + first
        rows = tokens * group
        table = sequence * max_blocks
        head_offset = head * head_stride
        value_offset = head_offset + head_dim * block_size

        for i in range(tokens):
            for j in range(group):
                column = (head * group + j) * head_dim
                row = (i * group + j) * head_dim
                for c in range(half):
                    x = qkv[first_row + i, column + c] * factor
                    y = qkv[first_row + i, column + half + c] * factor
                    q[row + c] = x * cos[position + i, c] - y * sin[position + i, c]
                    q[row + half + c] = y * cos[position + i, c] + x * sin[position + i, c]
        for i in range(rows * value_dim):
            outputs[i] = ZERO
        for row in range(rows):
            maxima[row] = NEGATIVE_INFINITY
            sums[row] = ZERO

        start = max(position - sliding_window + 1, 0) // block_size * block_size
        stop = position + tokens
        while start < stop:
            chunk_stop = min((start // KEY_CHUNK + 1) * KEY_CHUNK, stop)
            num_groups = (chunk_stop - start + LANES - 1) // LANES

            key_group = 0
            while key_group < num_groups:
                vectors = MAX_VECTORS
                while vectors > num_groups - key_group:
                    vectors //= 2
                k = start + key_group * LANES
                groups = (
                    _key_offset(block_tables, sequence, k, block_size, block_stride, head_offset),
                    _key_offset(
                        block_tables,
                        sequence,
                        min(k + LANES, chunk_stop - 1),
                        block_size,
                        block_stride,
                        head_offset,
                    ),
                    _key_offset(
                        block_tables,
                        sequence,
                        min(k + 2 * LANES, chunk_stop - 1),
                        block_size,
                        block_stride,
                        head_offset,
                    ),
                    _key_offset(
                        block_tables,
                        sequence,
                        min(k + 3 * LANES, chunk_stop - 1),
                        block_size,
                        block_stride,
                        head_offset,
                    ),
                )
                for row in range(0, rows, MAX_ROWS):
                    row_count = min(MAX_ROWS, rows - row)
                    if k <= position + (row + row_count - 1) // group:
                        scores_tile(
                            row_count, vectors, q, row * head_dim, head_dim, cache, groups, block_size, head_dim,
                            scores, row * SCORES_STRIDE + key_group * LANES, SCORES_STRIDE,
                        )  # fmt: skip
                key_group += vectors

            for row in range(rows):
                last = position + row // group
                low = max(last - sliding_window + 1, start) - start
                high = min(last + 1, chunk_stop) - start
                _softmax_chunk(
                    scores, row * SCORES_STRIDE, low, high, num_groups, softcap, maxima, sums, row,
                    outputs, row * value_dim, value_dim,
                )  # fmt: skip

            for row in range(0, rows, MAX_ROWS):
                row_count = min(MAX_ROWS, rows - row)
                num_keys = min(position + (row + row_count - 1) // group + 1, chunk_stop) - start
                column = 0
                while column < value_dim and num_keys > 0:
                    vectors = MAX_VECTORS
                    while vectors * LANES > value_dim - column:
                        vectors //= 2
                    values_tile(
                        row_count, vectors, scores, row * SCORES_STRIDE, SCORES_STRIDE, num_keys,
                        cache, value_offset + column, value_dim, block_stride, block_size,
                        block_tables, table + start // block_size,
                        outputs, row * value_dim + column, value_dim,
                    )  # fmt: skip
                    column += vectors * LANES
            start = chunk_stop

        for i in range(tokens):
            for j in range(group):
                row = i * group + j
                inverse = ONE / sums[row]
                column = (head * group + j) * head_dim
                for c in range(head_dim):
                    out[first_row + i, column + c] = outputs[row * value_dim + c] * inverse


@kernel
def _key_offset(
    block_tables: Int32Array, sequence: int, key: int, block_size: int, block_stride: int, head_offset: int
) -> int:
    """Where in the cache the keys of the 16 tokens from ``key`` on begin."""
    block = np.int64(block_tables[sequence, key // block_size])
    return block * block_stride + head_offset + key % block_size // LANES * LANES


@kernel
def _softmax_chunk(
    scores: Float32Array,
    offset: int,
    low: int,
    high: int,
    num_groups: int,
    softcap: float,
    maxima: Float32Array,
    sums: Float32Array,
    row: int,
    outputs: Float32Array,
    output_offset: int,
    value_dim: int,
) -> None:
    """Turns the scores of one row into weights relative to the row's running maximum; keys outside [low, high) weigh 0."""
    zero = splat(ZERO)
    if low >= high:
        for i in range(num_groups):
            store(scores, offset + i * LANES, zero)
        return
    first_group = low // LANES
    stop_group = (high + LANES - 1) // LANES
    for i in range(first_group):
        store(scores, offset + i * LANES, zero)
    for i in range(stop_group, num_groups):
        store(scores, offset + i * LANES, zero)

    if softcap > 0.0:
        # softcap * tanh(s / softcap), with tanh(y) = (e^2y - 1) / (e^2y + 1), then in units of log2
        inner = splat(np.float32(2.0) * LOG2_E / np.float32(softcap))
        outer = splat(np.float32(softcap) * LOG2_E)
        one = splat(ONE)
        for i in range(first_group, stop_group):
            y = multiply(load(scores, offset + i * LANES), inner)
            e = exp2(at_most(y, np.float32(60.0)))
            store(scores, offset + i * LANES, multiply(outer, divide(subtract(e, one), add(e, one))))

    largest = splat(maxima[row])
    for i in range(first_group, stop_group):
        s = keep_between(
            load(scores, offset + i * LANES), low - i * LANES, high - i * LANES, NEGATIVE_INFINITY
        )
        store(scores, offset + i * LANES, s)
        largest = maximum(s, largest)
    new_maximum = max_lanes(largest)
    shift = splat(new_maximum)
    total = splat(ZERO)
    for i in range(first_group, stop_group):
        p = exp2(subtract(load(scores, offset + i * LANES), shift))
        store(scores, offset + i * LANES, p)
        total = add(total, p)
    # Before the first chunk the maximum is -inf and the scale 0; sum and output are 0 as well.
    scale = exp2(subtract(splat(maxima[row]), shift))
    sums[row] = sums[row] * max_lanes(scale) + sum_lanes(total)
    if maxima[row] != new_maximum:
        for c in range(0, value_dim, LANES):
            store(outputs, output_offset + c, multiply(load(outputs, output_offset + c), scale))
    maxima[row] = new_maximum
