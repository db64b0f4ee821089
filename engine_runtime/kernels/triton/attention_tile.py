"""What decoding and prefill share: reading tiles of the cache, and one step of the online softmax."""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    cache,
    block,
    part,
    kv_head,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TMA: tl.constexpr,
):
    """Keys (part 0) or values (part 1) of a block: [BLOCK_SIZE, BLOCK_D], columns past HEAD_DIM zero."""
    row = ((block * 2 + part) * num_kv_heads + kv_head) * BLOCK_SIZE
    if TMA:
        return cache.load([row, 0])
    else:
        column = tl.arange(0, BLOCK_D)
        place = (
            cache
            + row.to(tl.int64) * HEAD_DIM
            + tl.arange(0, BLOCK_SIZE)[:, None] * HEAD_DIM
            + column[None, :]
        )
        if HEAD_DIM == BLOCK_D:
            return tl.load(place)
        else:
            return tl.load(place, mask=(column < HEAD_DIM)[None, :], other=0.0)


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
    TMA: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds keys and values at positions [first, last) to a running softmax; ``first`` starts a block.

    Args:
        q: [rows, BLOCK_D]; ``position`` [rows] is where each row stands.
        acc, largest, total: float32 [rows, BLOCK_D], [rows], [rows]: sums weighed with 2 ** (logit - largest).
        table: block ids of the sequence.
        scale: makes dot products logits in base 2; with SOFTCAP: twice that, divided by ``cap``.
        MASKED: whether some row may not see some key of the range.
    """
    end = tl.cdiv(last, BLOCK_SIZE) - 1
    # An empty range may begin behind the table.
    block = tl.load(table + tl.maximum(tl.minimum(first // BLOCK_SIZE, end), 0))
    for start in tl.range(first, last, BLOCK_SIZE, num_stages=STAGES):
        # One tile ahead, so that no load waits for the block table.
        next_block = tl.load(table + tl.minimum(start // BLOCK_SIZE + 1, end))
        k = load_tile(cache, block, 0, kv_head, num_kv_heads, HEAD_DIM, BLOCK_D, BLOCK_SIZE, TMA)
        logits = tl.dot(q, k.to(q.dtype).T)
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (1 + e ** 2x)
            logits = cap - 2.0 * cap / (1.0 + tl.exp2(logits * scale))
            factor = 1.0
        else:
            factor = scale
        if MASKED:
            key = start + tl.arange(0, BLOCK_SIZE)[None, :]
            visible = (key <= position[:, None]) & ((window == 0) | (key > position[:, None] - window))
            # Not -inf: a row that sees nothing yet takes weights that its first key wipes out.
            logits = tl.where(visible, logits, -1e30)
        new_largest = tl.maximum(largest, tl.max(logits, 1) * factor)
        weights = tl.exp2(logits * factor - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v = load_tile(cache, block, 1, kv_head, num_kv_heads, HEAD_DIM, BLOCK_D, BLOCK_SIZE, TMA)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc)
        largest = new_largest
        block = next_block
    return acc, largest, total


@triton.jit
def add_sink(largest, total, sinks, head, has_sinks, is_row):
    """The attention sink of each head: one more logit in the denominator. Returns (shrink, total)."""
    # 2 ** -1e30 is 0: no sink.
    sink = tl.load(sinks + head, mask=is_row & (has_sinks != 0), other=-1e30).to(tl.float32)
    sink = tl.maximum(sink * 1.4426950408889634, -1e30)
    new_largest = tl.maximum(largest, sink)
    shrink = tl.exp2(largest - new_largest)
    return shrink, total * shrink + tl.exp2(sink - new_largest)
