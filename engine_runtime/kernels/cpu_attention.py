"""Rotary embedding, KV cache write and paged attention on a CPU: the compiled part.

A block of the cache holds, for each KV head, the keys transposed and then the values:

    cache[block, kv_head] = K^T [head_dim, block_size] | V [block_size, value_dim]

so that both products of attention read whole vectors, and 8 KB in a row for 16 tokens of head_dim 64.
``value_dim`` is head_dim rounded up to whole vectors; the padding is written as zeros.

The query heads that share a KV head are rows of one matrix, so K and V are read once for all of them, and a
prefill chunk is cut into tiles of about 24 rows. Each tile runs over its keys in chunks that end at
multiples of 512 with the online softmax (arXiv:1805.02867), in units of log2. A row's result is a function
of its own q, K and V alone: chunks and lanes depend on the absolute position of a key, and masked keys only
add exact zeros.
"""

from __future__ import annotations

import numpy as np

from engine_runtime.kernels.cpu_compile import kernel
from engine_runtime.kernels.cpu_simd import (
    LANES,
    add,
    address,
    at_most,
    divide,
    exp2,
    keep_between,
    load,
    load_scalar,
    max_lanes,
    maximum,
    multiply,
    splat,
    stack_memory,
    store,
    store_scalar,
    store_transposed,
    subtract,
    sum_lanes,
)
from engine_runtime.kernels.cpu_tiles import MAX_ROWS, MAX_VECTORS, scores_tile, values_tile
from engine_runtime.kernels.numpy_types import Float32Array, Int32Array, KvArray

KEY_CHUNK = 512
SCORES_STRIDE = KEY_CHUNK + LANES  # not a power of two, which would map all rows to the same cache set
LOG2_E = np.float32(1.4426950408889634)
NEGATIVE_INFINITY = np.float32(-np.inf)
ZERO = np.float32(0.0)
ONE = np.float32(1.0)


@kernel
def write_kv(
    qkv: Float32Array,
    cache: KvArray,
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
    whole = head_dim // LANES * LANES
    rotated = stack_memory()
    qkv_width = qkv.shape[1]
    qkv_at = address(qkv)
    cos_at = address(cos)
    sin_at = address(sin)
    for sequence in range(first_sequence, last_sequence):
        first = int(query_start[sequence])
        count = int(query_start[sequence + 1]) - first
        start = int(context_len[sequence]) - count
        i = 0
        while i < count:
            position = start + i
            block = int(block_tables[sequence, position // block_size])
            slot = position % block_size
            # Keys are transposed 16 at a time in registers where all 16 are new, else one by one.
            tokens = LANES if slot % LANES == 0 and count - i >= LANES else 1
            for head in range(num_kv_heads):
                keys = (block * num_kv_heads + head) * head_stride + slot
                column = (num_heads + head) * head_dim
                for j in range(tokens):
                    _rotate(
                        qkv_at, (first + i + j) * qkv_width + column, ONE,
                        cos_at, sin_at, (position + j) * half, half, rotated, j * head_dim,
                    )  # fmt: skip
                transposed = whole if tokens == LANES else 0
                for c in range(0, transposed, LANES):
                    store_transposed(rotated, c, head_dim, cache, keys + c * block_size, block_size)
                for c in range(transposed, head_dim):
                    for j in range(tokens):
                        value = load_scalar(rotated, j * head_dim + c)
                        store_scalar(cache, keys + c * block_size + j, value)
                values = keys - slot + head_dim * block_size + slot * value_dim
                column = (num_heads + num_kv_heads + head) * head_dim
                for j in range(tokens):
                    source = (first + i + j) * qkv_width + column
                    for c in range(0, whole, LANES):
                        store(cache, values + j * value_dim + c, load(qkv_at, source + c))
                    for c in range(whole, head_dim):
                        store_scalar(cache, values + j * value_dim + c, load_scalar(qkv_at, source + c))
                    for c in range(head_dim, value_dim):
                        store_scalar(cache, values + j * value_dim + c, ZERO)
            i += tokens


@kernel
def _rotate(
    source: int,
    source_offset: int,
    factor: float,
    cos: int,
    sin: int,
    angle: int,
    half: int,
    target: int,
    target_offset: int,
) -> None:
    """target = rotary embedding (arXiv:2104.09864) of one head of one token, times ``factor``.

    Memory is given by addresses; ``angle`` is where in ``cos`` and ``sin`` the row of the position begins.
    """
    scale = splat(factor)
    whole = half // LANES * LANES
    for c in range(0, whole, LANES):
        x = multiply(load(source, source_offset + c), scale)
        y = multiply(load(source, source_offset + half + c), scale)
        cosine = load(cos, angle + c)
        sine = load(sin, angle + c)
        store(target, target_offset + c, subtract(multiply(x, cosine), multiply(y, sine)))
        store(target, target_offset + half + c, add(multiply(y, cosine), multiply(x, sine)))
    for c in range(whole, half):
        u = load_scalar(source, source_offset + c) * factor
        v = load_scalar(source, source_offset + half + c) * factor
        cosine_c = load_scalar(cos, angle + c)
        sine_c = load_scalar(sin, angle + c)
        store_scalar(target, target_offset + c, u * cosine_c - v * sine_c)
        store_scalar(target, target_offset + half + c, v * cosine_c + u * sine_c)


@kernel
def attend(
    qkv: Float32Array,
    cache: KvArray,
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
    """Attention of units ``first_unit`` to ``last_unit - 1``: unit u is KV head u % num_kv_heads of tile
    u // num_kv_heads, and a tile a row (sequence, first token, last token + 1) of ``tiles``, where the tokens
    are counted from the first that the sequence computes in this step.
    """
    qkv_width = qkv.shape[1]
    qkv_at = address(qkv)
    cos_at = address(cos)
    sin_at = address(sin)
    q_at = address(q)
    scores_at = address(scores)
    outputs_at = address(outputs)
    half = head_dim // 2
    whole = head_dim // LANES * LANES
    group = num_heads // num_kv_heads
    head_stride = block_size * (head_dim + value_dim)
    block_stride = num_kv_heads * head_stride
    max_blocks = block_tables.shape[1]
    factor = np.float32(scale) if softcap > 0.0 else np.float32(scale) * LOG2_E
    for unit in range(first_unit, last_unit):
        tile = unit // num_kv_heads
        head = unit % num_kv_heads
        sequence = int(tiles[tile, 0])
        first = int(tiles[tile, 1])
        tokens = int(tiles[tile, 2]) - first
        first_row = int(query_start[sequence]) + first
        computed = context_len[sequence] - (query_start[sequence + 1] - query_start[sequence])
        position = int(computed + first)
        rows = tokens * group
        table = sequence * max_blocks
        head_offset = head * head_stride
        value_offset = head_offset + head_dim * block_size

        for i in range(tokens):
            for j in range(group):
                column = (head * group + j) * head_dim
                _rotate(
                    qkv_at, (first_row + i) * qkv_width + column, factor,
                    cos_at, sin_at, (position + i) * half, half, q_at, (i * group + j) * head_dim,
                )  # fmt: skip
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
                for row in range(0, rows, MAX_ROWS):
                    row_count = min(MAX_ROWS, rows - row)
                    if k <= position + (row + row_count - 1) // group:
                        scores_tile(
                            row_count, vectors, q_at, row * head_dim, head_dim, head_dim,
                            cache, head_offset, block_stride, block_size, block_tables, table, k,
                            stop, value_offset, value_dim,
                            scores_at, row * SCORES_STRIDE + key_group * LANES, SCORES_STRIDE,
                        )  # fmt: skip
                key_group += vectors

            for row in range(rows):
                last = position + row // group
                low = max(last - sliding_window + 1, start) - start
                high = min(last + 1, chunk_stop) - start
                maxima[row], sums[row] = _softmax_chunk(
                    scores_at, row * SCORES_STRIDE, low, high, num_groups, softcap, maxima[row], sums[row],
                    outputs_at, row * value_dim, value_dim,
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
                        row_count, vectors, scores_at, row * SCORES_STRIDE, SCORES_STRIDE, num_keys,
                        cache, value_offset + column, value_dim, block_stride, block_size,
                        block_tables, table + start // block_size,
                        outputs_at, row * value_dim + column, value_dim,
                    )  # fmt: skip
                    column += vectors * LANES
            start = chunk_stop

        for i in range(tokens):
            for j in range(group):
                row = i * group + j
                inverse = ONE / sums[row]
                column = (head * group + j) * head_dim
                scale_vector = splat(inverse)
                for c in range(0, whole, LANES):
                    scaled = multiply(load(outputs, row * value_dim + c), scale_vector)
                    store(out, (first_row + i) * out.shape[1] + column + c, scaled)
                for c in range(whole, head_dim):
                    out[first_row + i, column + c] = outputs[row * value_dim + c] * inverse


@kernel
def _softmax_chunk(
    scores: int,
    offset: int,
    low: int,
    high: int,
    num_groups: int,
    softcap: float,
    old_maximum: float,
    old_sum: float,
    outputs: int,
    output_offset: int,
    value_dim: int,
) -> tuple[float, float]:
    """Turns the scores of a row into weights relative to the row's maximum so far; rescales its output.

    Keys outside [low, high) get the weight 0. Memory is given by addresses. Returns maximum and sum so far.
    """
    zero = splat(ZERO)
    if low >= high:
        for i in range(num_groups):
            store(scores, offset + i * LANES, zero)
        return old_maximum, old_sum
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

    largest = splat(old_maximum)
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
    scale = exp2(subtract(splat(old_maximum), shift))
    if old_maximum != new_maximum:
        for c in range(0, value_dim, LANES):
            store(outputs, output_offset + c, multiply(load(outputs, output_offset + c), scale))
    return new_maximum, old_sum * max_lanes(scale) + sum_lanes(total)
