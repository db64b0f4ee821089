"""Attention of one token a sequence, or a few, over long contexts: reading the cache at memory's speed.

The contexts of all sequences are cut into tiles of about equal length, so that a few long sequences, many
short ones and any mixture keep all multiprocessors busy. ``plan_decode`` does so on the device: a launch is
then the same at every step, and can be replayed from a CUDA graph while contexts grow.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine_runtime.kernels.triton.attention_tile import NOTHING, add_sink, attend, attend_pairs

RECORD = tl.constexpr(8)


@triton.jit
def _tokens_of_time(num_programs, num_multiprocessors, share, size, is_alone, start_cost):
    """How long programs of ``size`` tokens take, in tokens that a busy multiprocessor reads meanwhile.

    Of those that do not have it alone, a single one keeps it 45 % busy, two 81 %, three 93 % (fitted to times
    on an H200).
    """
    rounds = tl.cdiv(num_programs, num_multiprocessors)
    begun = (num_programs * start_cost).to(tl.float32) / num_multiprocessors
    started = size + start_cost
    alone = tl.minimum(rounds.to(tl.float32) * started, share.to(tl.float32) + begun + started)
    # They come and go by fours, if they are equally long.
    rest = rounds % 4
    rest_time = tl.where(rest == 0, 0.0, tl.where(rest == 1, 2.2, tl.where(rest == 2, 2.47, 3.2)))
    by_fours = (rounds // 4 * 4 + rest_time) * size
    together = tl.where(rounds <= 4, by_fours, tl.minimum(by_fours, share.to(tl.float32) + 2.2 * size))
    return tl.where(is_alone != 0, alone, together)


@triton.jit
def plan_decode(
    query_start,
    context_len,
    tiles,
    num_sequences,
    num_tiles,
    window,
    num_kv_heads,
    num_multiprocessors,
    step,
    is_alone,
    start_cost,
    cut_cost,
    part_cost,
    MAX_SEQUENCES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Grid: 1. query_start int32 [num_sequences + 1], context_len int32 [num_sequences].

    Writes tiles int32 [num_tiles, 8]: sequence, first and last + 1 position, split, number of splits, row of
    the sequence's first token in q, number of tokens, context length. num_tiles > num_sequences. Unused tiles
    get sequence -1. A sequence without context gets a tile of nothing. Lengths of tiles are multiples of
    ``step``, but for the last of a sequence.

    Of a few sizes of a tile it takes the one with which the multiprocessors should be done first.
    is_alone: programs have a multiprocessor for themselves. Costs are the times in which a busy one reads so
    many tokens: start_cost, until a program that is alone reads its first; cut_cost, to add up parts at all;
    part_cost, for each of them.
    """
    sequence = tl.arange(0, MAX_SEQUENCES)
    exists = sequence < num_sequences
    context = tl.load(context_len + sequence, mask=exists, other=0)
    start = tl.load(query_start + sequence, mask=exists, other=0)
    num_tokens = tl.load(query_start + sequence + 1, mask=exists, other=0) - start
    first = (
        tl.where(window > 0, tl.maximum(context - num_tokens - window + 1, 0), 0) // BLOCK_SIZE * BLOCK_SIZE
    )
    length = context - first
    longest = tl.max(length, 0)
    sum_of_lengths = tl.sum(length.to(tl.int64), 0)
    share = tl.cdiv(sum_of_lengths * num_kv_heads, num_multiprocessors)
    size = tl.maximum(tl.cdiv(longest, step), 1) * step
    least = _tokens_of_time(
        num_sequences * num_kv_heads, num_multiprocessors, share, size, is_alone, start_cost
    )
    for parts in range(1, 9):
        # sum(ceil(length / size)) <= sum(length) / size + num_sequences <= num_tiles
        extra = tl.minimum(parts * num_multiprocessors // num_kv_heads, num_tiles - num_sequences)
        tried = tl.cdiv(sum_of_lengths, tl.maximum(extra, 1)).to(tl.int32)
        tried = tl.maximum(tl.cdiv(tried, step), 1) * step
        count = tl.sum(tl.where(exists, tl.maximum(tl.cdiv(length, tried), 1), 0), 0)
        cost = _tokens_of_time(count * num_kv_heads, num_multiprocessors, share, tried, is_alone, start_cost)
        cost += cut_cost + part_cost * tl.cdiv(longest, tried)
        if (cost < least) & (extra > 0):
            least = cost
            size = tried
    splits = tl.where(exists, tl.maximum(tl.cdiv(length, size), 1), 0)
    end = tl.cumsum(splits, 0)
    for split in range(tl.max(splits, 0)):
        record = tiles + (end - splits + split) * RECORD
        is_split = split < splits
        tl.store(record, sequence, mask=is_split)
        tl.store(record + 1, first + split * size, mask=is_split)
        tl.store(record + 2, tl.minimum(first + (split + 1) * size, context), mask=is_split)
        tl.store(record + 3, split + tl.zeros_like(sequence), mask=is_split)
        tl.store(record + 4, splits, mask=is_split)
        tl.store(record + 5, start, mask=is_split)
        tl.store(record + 6, num_tokens, mask=is_split)
        tl.store(record + 7, context, mask=is_split)
    for rest in range(tl.sum(splits, 0), num_tiles, MAX_SEQUENCES):
        tile = rest + sequence
        tl.store(tiles + tile * RECORD, tl.full([MAX_SEQUENCES], -1, tl.int32), mask=tile < num_tiles)


@triton.jit
def _combine(
    out,
    partial,
    stats,
    sinks,
    slot,
    splits,
    num_rows,
    start,
    kv_head,
    v_scale,
    has_sinks,
    group,
    num_kv_heads,
    out_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    USED_ROWS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Adds up the splits of a sequence, from ``slot`` on, PIECES at a time. num_rows <= USED_ROWS."""
    row = tl.arange(0, USED_ROWS)
    is_row = row < num_rows
    column = tl.arange(0, BLOCK_D)
    piece = tl.arange(0, PIECES)
    best = tl.full([USED_ROWS], NOTHING, tl.float32)
    total = tl.zeros([USED_ROWS], tl.float32)
    acc = tl.zeros([USED_ROWS, BLOCK_D], tl.float32)
    for begin in range(0, splits, PIECES):
        is_piece = begin + piece < splits
        place = slot + (begin + piece).to(tl.int64) * num_kv_heads
        stat = stats + (place * (2 * ROWS))[:, None] + row[None, :]
        is_stat = is_piece[:, None] & is_row[None, :]
        largest = tl.load(stat, mask=is_stat, other=NOTHING)
        totals = tl.load(stat + ROWS, mask=is_stat, other=0.0)
        values = tl.load(
            partial
            + (place * (ROWS * BLOCK_D))[:, None, None]
            + (row * BLOCK_D)[None, :, None]
            + column[None, None, :],
            mask=is_stat[:, :, None] & (column < HEAD_DIM)[None, None, :],
            other=0.0,
        )
        new_best = tl.maximum(best, tl.max(largest, 0))
        weight = tl.exp2(largest - new_best[None, :])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(totals * weight, 0)
        acc = acc * shrink[:, None] + tl.sum(values * weight[:, :, None], 0)
        best = new_best
    head = kv_head * group + row % group
    shrink, total = add_sink(best, total, sinks, head, has_sinks, is_row)
    acc = acc * (shrink * v_scale / tl.where(is_row, total, 1.0))[:, None]
    place = (
        out
        + (start + row // group).to(tl.int64)[:, None] * out_stride
        + head[:, None] * HEAD_DIM
        + column[None, :]
    )
    tl.store(place, acc.to(out.dtype.element_ty), mask=is_row[:, None] & (column < HEAD_DIM)[None, :])


@triton.jit
def decode_attention(
    q,
    cache,
    out,
    tiles,
    partial,
    stats,
    arrivals,
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
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COMBINED: tl.constexpr,
    PAIRS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (num_kv_heads, tiles of ``plan_decode``). A sequence has at most ROWS // group tokens.

    Arguments as of ``prefill_attention``, and as workspace: partial float32 [tiles, num_kv_heads, ROWS,
    BLOCK_D], stats float32 [tiles, num_kv_heads, 2, ROWS], arrivals int32 [sequences, num_kv_heads], which
    are zero before and after. The program that finishes a sequence last adds up its splits, COMBINED numbers
    at a time. PAIRS: the cache is E4M3, read as int16. EARLY: tiles are read before the launch before has
    ended.
    """
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    record = tiles + tile * RECORD
    sequence = tl.load(record)
    first = tl.load(record + 1)
    last = tl.load(record + 2)
    split = tl.load(record + 3)
    splits = tl.load(record + 4)
    start = tl.load(record + 5)
    num_tokens = tl.load(record + 6)
    context = tl.load(record + 7)
    if sequence < 0:
        return
    row = tl.arange(0, ROWS)
    token = row // group
    is_row = token < num_tokens
    head = kv_head * group + row % group
    column = tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (column < HEAD_DIM)[None, :]
    query_row = (start + token).to(tl.int64)
    source = q + query_row[:, None] * q_stride + head[:, None] * HEAD_DIM
    table = block_tables + sequence.to(tl.int64) * table_stride
    largest = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    position = context - num_tokens + token
    if EARLY:
        # In this order, as in ``rope_cache``.
        gdc_wait()
        gdc_launch_dependents()
    if PAIRS:
        # See ``halves_of_pairs``.
        scale *= 256.0
        v_scale *= 256.0
        pair = tl.arange(0, BLOCK_D // 2)
        is_pair = is_row[:, None] & (pair < HEAD_DIM // 2)[None, :]
        even = tl.load(source + 2 * pair[None, :], mask=is_pair, other=0.0).to(tl.float16)
        odd = tl.load(source + 2 * pair[None, :] + 1, mask=is_pair, other=0.0).to(tl.float16)
        acc, largest, total = attend_pairs(
            even, odd, largest, total, cache, table, first, last, position, kv_head, num_kv_heads,
            scale, cap, window, HEAD_DIM, BLOCK_D, BLOCK_SIZE, STEP, SOFTCAP, STAGES,
        )  # fmt: skip
    else:
        rows = tl.load(source + column[None, :], mask=mask, other=0.0)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        acc, largest, total = attend(
            rows, acc, largest, total, cache, table, first, last, position, kv_head, num_kv_heads,
            scale, cap, window, HEAD_DIM, BLOCK_D, BLOCK_SIZE, STEP, SOFTCAP, True, STAGES,
        )  # fmt: skip

    if splits == 1:
        place = out + query_row[:, None] * out_stride + head[:, None] * HEAD_DIM + column[None, :]
        shrink, total = add_sink(largest, total, sinks, head, has_sinks, is_row)
        acc = acc * (shrink * v_scale / tl.where(total > 0.0, total, 1.0))[:, None]
        tl.store(place, acc.to(out.dtype.element_ty), mask=mask)
        return

    slot = tile.to(tl.int64) * num_kv_heads + kv_head
    tl.store(partial + slot * (ROWS * BLOCK_D) + row[:, None] * BLOCK_D + column[None, :], acc, mask=mask)
    tl.store(stats + slot * (2 * ROWS) + row, largest, mask=is_row)
    tl.store(stats + slot * (2 * ROWS) + ROWS + row, total, mask=is_row)
    # All threads' stores come before the one that counts; who counts last sees the stores of all splits.
    tl.debug_barrier()
    arrival = arrivals + sequence * num_kv_heads + kv_head
    if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") < splits - 1:
        return
    tl.store(arrival, 0)
    slot -= split.to(tl.int64) * num_kv_heads
    num_rows = num_tokens * group
    if num_rows <= 4:
        _combine(
            out, partial, stats, sinks, slot, splits, num_rows, start, kv_head, v_scale, has_sinks, group,
            num_kv_heads, out_stride, HEAD_DIM, BLOCK_D, ROWS, 4, COMBINED // (4 * BLOCK_D),
        )  # fmt: skip
    else:
        _combine(
            out, partial, stats, sinks, slot, splits, num_rows, start, kv_head, v_scale, has_sinks, group,
            num_kv_heads, out_stride, HEAD_DIM, BLOCK_D, ROWS, ROWS, max(COMBINED // (ROWS * BLOCK_D), 1),
        )  # fmt: skip
