"""Attention of chunks of prompts against what is cached, themselves included."""

import triton
import triton.language as tl

from engine_runtime.kernels.triton.attention_tile import NOTHING, add_sink, attend


@triton.jit
def prefill_attention(
    q,
    cache,
    out,
    tiles,
    block_tables,
    sinks,
    scale,
    cap,
    v_scale,
    has_sinks,
    window,
    group,
    num_kv_heads,
    q_stride,
    out_stride,
    table_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (num_kv_heads, tiles). A program: up to ROWS // group tokens and all query heads of a KV head.

    tiles int32 [num_tiles, 4]: sequence (-1: nothing to do), row of the first token in q, number of tokens,
    and position of the first. q [T, q_stride], out [T, out_stride]; block_tables int32 [S, table_stride].
    sinks float32 [num_heads], read if has_sinks. scale, cap: see ``attend``. v_scale: of an FP8 cache, or 1.
    """
    kv_head = tl.program_id(0)
    record = tiles + tl.program_id(1) * 4
    sequence = tl.load(record)
    first_row = tl.load(record + 1)
    num_tokens = tl.load(record + 2)
    low = tl.load(record + 3)
    if sequence < 0:
        return
    row = tl.arange(0, ROWS)
    is_row = row < num_tokens * group
    # Rows without a token do what the last one does.
    token = tl.minimum(row // group, num_tokens - 1)
    head = kv_head * group + row % group
    column = tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (column < HEAD_DIM)[None, :]
    query_row = (first_row + token).to(tl.int64)
    rows = tl.load(
        q + query_row[:, None] * q_stride + head[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0
    )
    position = low + token
    high = low + num_tokens
    # Blocks [first, seen) cut the window, [seen, diagonal) are visible to all rows, the rest are diagonal.
    first = tl.where(window > 0, tl.maximum(low - window + 1, 0), 0) // BLOCK_SIZE * BLOCK_SIZE
    diagonal = (low + 1) // BLOCK_SIZE * BLOCK_SIZE
    seen = tl.where(window > 0, tl.cdiv(tl.maximum(high - window, 0), BLOCK_SIZE) * BLOCK_SIZE, 0)
    seen = tl.maximum(first, seen)
    diagonal = tl.maximum(diagonal, seen)

    table = block_tables + sequence.to(tl.int64) * table_stride
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    largest = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc, largest, total = attend(
        rows, acc, largest, total, cache, table, first, tl.minimum(seen, high), position, kv_head,
        num_kv_heads, scale, cap, window, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_SIZE, SOFTCAP, True, STAGES,
    )  # fmt: skip
    acc, largest, total = attend(
        rows, acc, largest, total, cache, table, seen, diagonal, position, kv_head, num_kv_heads,
        scale, cap, window, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_SIZE, SOFTCAP, False, STAGES,
    )  # fmt: skip
    acc, largest, total = attend(
        rows, acc, largest, total, cache, table, diagonal, high, position, kv_head, num_kv_heads,
        scale, cap, window, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_SIZE, SOFTCAP, True, STAGES,
    )  # fmt: skip

    shrink, total = add_sink(largest, total, sinks, head, has_sinks, is_row)
    acc = acc * (shrink * v_scale / total)[:, None]
    place = out + query_row[:, None] * out_stride + head[:, None] * HEAD_DIM + column[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=mask)
