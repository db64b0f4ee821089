"""What decoding and prefill share: reading tiles of the cache, and one step of the online softmax."""

import triton
import triton.language as tl

from engine_runtime.kernels import attention_layout

NOTHING = tl.constexpr(attention_layout.NOTHING)
HALVES_OF_PAIRS = tl.constexpr(attention_layout.HALVES_OF_PAIRS)


@triton.jit
def load_blocks(table, position, end, BLOCK_SIZE: tl.constexpr, STEP: tl.constexpr):
    """Blocks of the STEP tokens at ``position`` and following: one if STEP is BLOCK_SIZE, or a block a token.

    There are none behind block ``end``, which stands for them, nor where that is negative.
    """
    place = position // BLOCK_SIZE
    if STEP != BLOCK_SIZE:
        place += tl.arange(0, STEP) // BLOCK_SIZE
    return tl.load(table + tl.maximum(tl.minimum(place, end), 0))


@triton.jit
def rows_of_keys(blocks, kv_head, num_kv_heads, BLOCK_SIZE: tl.constexpr, STEP: tl.constexpr):
    """Rows of the cache, as one array of rows, that hold the keys of ``load_blocks``: int64 [STEP].

    Those of their values come num_kv_heads * BLOCK_SIZE later.
    """
    first = (blocks.to(tl.int64) * 2 * num_kv_heads + kv_head) * BLOCK_SIZE
    return first + tl.arange(0, STEP) % BLOCK_SIZE


@triton.jit
def load_rows(cache, rows, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of the cache: [len(rows), PADDED], columns past WIDTH zero."""
    column = tl.arange(0, PADDED)
    place = cache + rows[:, None] * WIDTH + column[None, :]
    if WIDTH == PADDED:
        return tl.load(place)
    else:
        return tl.load(place, mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def weigh(
    logits,
    largest,
    total,
    start,
    position,
    scale,
    cap,
    window,
    STEP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of the online softmax.

    Returns:
        weights of the keys, factor of earlier sums, new ``largest`` and ``total``.
    """
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + e ** 2x)
        logits = cap - 2.0 * cap / (1.0 + tl.exp2(logits * scale))
        factor = 1.0
    else:
        factor = scale
    if MASKED:
        key = start + tl.arange(0, STEP)[None, :]
        visible = (key <= position[:, None]) & ((window == 0) | (key > position[:, None] - window))
        # Not -inf: a row that sees nothing yet takes weights that its first key wipes out.
        logits = tl.where(visible, logits, NOTHING)
    new_largest = tl.maximum(largest, tl.max(logits, 1) * factor)
    weights = tl.exp2(logits * factor - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    return weights, shrink, new_largest, total * shrink + tl.sum(weights, 1)


@triton.jit
def attend(
    q,
    acc,
    largest,
    total,
    cache,
    table,
    first,
    last,
    position,
    kv_head,
    num_kv_heads,
    scale,
    cap,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STEP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds keys and values at positions [first, last) to a running softmax; ``first`` starts a block.

    STEP at a time, a multiple of BLOCK_SIZE. MASKED has to be if ``last`` ends a step before its end.

    Args:
        q: [rows, BLOCK_D]; ``position`` [rows] is where each row stands.
        acc, largest, total: float32 [rows, BLOCK_D], [rows], [rows]: sums weighed by 2 ** (logit - largest).
        table: block ids of the sequence.
        scale: makes dot products logits in base 2; with SOFTCAP: twice that, divided by ``cap``.
        MASKED: whether some row may not see some key of the range.
    """
    end = tl.cdiv(last, BLOCK_SIZE) - 1
    blocks = load_blocks(table, first, end, BLOCK_SIZE, STEP)
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        # One step ahead, so that no load waits for the block table.
        next_blocks = load_blocks(table, start + STEP, end, BLOCK_SIZE, STEP)
        rows = rows_of_keys(blocks, kv_head, num_kv_heads, BLOCK_SIZE, STEP)
        k = load_rows(cache, rows, HEAD_DIM, BLOCK_D)
        logits = tl.dot(q, k.to(q.dtype).T)
        weights, shrink, largest, total = weigh(
            logits, largest, total, start, position, scale, cap, window, STEP, SOFTCAP, MASKED
        )
        v = load_rows(cache, rows + num_kv_heads * BLOCK_SIZE, HEAD_DIM, BLOCK_D)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None])
        blocks = next_blocks
    return acc, largest, total


@triton.jit
def halves_of_pairs(pairs):
    """int16 pairs of E4M3 -> both as float16, divided by 256: its exponent is biased by 8 more."""
    return tl.inline_asm_elementwise(
        HALVES_OF_PAIRS,
        "=r,=r,r",
        [pairs],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def attend_pairs(
    even,
    odd,
    largest,
    total,
    cache,
    table,
    first,
    last,
    position,
    kv_head,
    num_kv_heads,
    scale,
    cap,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STEP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``attend`` for a cache of int16 pairs of E4M3, read as they are, with even and odd columns apart.

    Tensor cores want neighbouring tokens of V in one register: bytes cannot be transposed on the way from
    shared memory, 16-bit pairs can. even, odd: float16 [rows, BLOCK_D / 2], columns of q.
    """
    half: tl.constexpr = BLOCK_D // 2
    width: tl.constexpr = HEAD_DIM // 2
    acc_even = tl.zeros([even.shape[0], half], tl.float32)
    acc_odd = tl.zeros([even.shape[0], half], tl.float32)
    end = tl.cdiv(last, BLOCK_SIZE) - 1
    blocks = load_blocks(table, first, end, BLOCK_SIZE, STEP)
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        next_blocks = load_blocks(table, start + STEP, end, BLOCK_SIZE, STEP)
        rows = rows_of_keys(blocks, kv_head, num_kv_heads, BLOCK_SIZE, STEP)
        k_even, k_odd = halves_of_pairs(load_rows(cache, rows, width, half))
        logits = tl.dot(odd, k_odd.T, tl.dot(even, k_even.T))
        weights, shrink, largest, total = weigh(
            logits, largest, total, start, position, scale, cap, window, STEP, SOFTCAP, True
        )
        weights = weights.to(tl.float16)
        v_even, v_odd = halves_of_pairs(load_rows(cache, rows + num_kv_heads * BLOCK_SIZE, width, half))
        acc_even = tl.dot(weights, v_even, acc_even * shrink[:, None])
        acc_odd = tl.dot(weights, v_odd, acc_odd * shrink[:, None])
        blocks = next_blocks
    return tl.interleave(acc_even, acc_odd), largest, total


@triton.jit
def add_sink(largest, total, sinks, head, has_sinks, is_row):
    """The attention sink of each head: one more logit in the denominator. Returns (shrink, total)."""
    sink = tl.load(sinks + head, mask=is_row & (has_sinks != 0), other=NOTHING).to(tl.float32)
    sink = tl.maximum(sink * 1.4426950408889634, NOTHING)
    new_largest = tl.maximum(largest, sink)
    shrink = tl.exp2(largest - new_largest)
    return shrink, total * shrink + tl.exp2(sink - new_largest)
