"""``draw_wide``: the rows that filter and have too many candidates for ``draw``.

A pass over the row sums what is above each of eight pivots, which leaves a ninth of the interval that the
threshold is in; after two passes what lies in it is gathered, and if that is too much, so on.
"""

import triton
import triton.language as tl

from engine_runtime.kernels.triton.sampling_row import (
    FACTOR,
    FLAGS,
    INFINITY,
    MAX_SUBTILES,
    MIN_WEIGHT,
    NUM_ADDRESSES,
    NUM_NUMBERS,
    NUM_WORDS,
    ONE_BITS,
    PATHS,
    SMALLEST,
    SUBTILE,
    TOP_K,
    TOP_P,
    UNIFORM,
    VOCAB_SIZES,
    WIDE_FEW,
    bits_of,
    commit,
    draw_from,
    find_threshold,
    float_at,
    spec,
    ties_of_sum,
    undo_changes,
    values_of,
    weigh,
    write_changes,
)

BLOCK = tl.constexpr(8192)
COLUMNS = tl.constexpr(2048)
"""A multiple of what the threads of a program load at a time, so that each sums its own columns."""


@triton.jit
def _tail(bits, values, pivot):
    """Of each column: the sum of the values whose bits are >= pivot."""
    return tl.sum(tl.where(bits >= pivot, values, 0.0), 0)


@triton.jit
def _narrow(
    logits, largest, factor, low, high, needed, by_count, flags, words, addresses, vocab_size,
    ADJUSTS: tl.constexpr,
):  # fmt: skip
    """The ninth of [low, high) that ``find_threshold`` would find its answer in, by one pass over the row."""
    step = tl.maximum((high - low) // 9, 1)
    zeros = tl.zeros([COLUMNS], tl.float32)
    a, b, c, d, e, f, g, h = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for start in range(0, vocab_size, 4 * COLUMNS):
        ids = start + tl.arange(0, 4)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        x = values_of(logits, ids, ids < vocab_size, flags, words, addresses, ADJUSTS)
        weights = weigh(x, largest, factor)
        bits = bits_of(weights)
        values = tl.where(by_count & (bits > 0), 1.0, weights)
        a += _tail(bits, values, low + step)
        b += _tail(bits, values, low + 2 * step)
        c += _tail(bits, values, low + 3 * step)
        d += _tail(bits, values, low + 4 * step)
        e += _tail(bits, values, low + 5 * step)
        f += _tail(bits, values, low + 6 * step)
        g += _tail(bits, values, low + 7 * step)
        h += _tail(bits, values, low + 8 * step)
    enough = (tl.sum(a, 0) >= needed).to(tl.int32) + (tl.sum(b, 0) >= needed).to(tl.int32)
    enough += (tl.sum(c, 0) >= needed).to(tl.int32) + (tl.sum(d, 0) >= needed).to(tl.int32)
    enough += (tl.sum(e, 0) >= needed).to(tl.int32) + (tl.sum(f, 0) >= needed).to(tl.int32)
    enough += (tl.sum(g, 0) >= needed).to(tl.int32) + (tl.sum(h, 0) >= needed).to(tl.int32)
    new_high = tl.where(enough < 8, tl.minimum(high, low + (enough + 1) * step), high)
    return low + enough * step, new_high


@triton.jit
def _gather_between(
    logits, largest, factor, low, high, few_weights, flags, words, addresses, vocab_size,
    ADJUSTS: tl.constexpr,
):  # fmt: skip
    """Copies weights in [low, high), WIDE_FEW at most. Returns their number, and number and sum above."""
    entry = tl.arange(0, BLOCK)
    count = low * 0
    numbers = tl.zeros([BLOCK], tl.int32)
    sums = tl.zeros([BLOCK], tl.float32)
    tl.debug_barrier()
    for start in range(0, vocab_size, BLOCK):
        ids = start + entry
        x = values_of(logits, ids, ids < vocab_size, flags, words, addresses, ADJUSTS)
        weights = weigh(x, largest, factor)
        bits = bits_of(weights)
        is_candidate = (bits >= low) & (bits < high)
        place = count + tl.cumsum(is_candidate.to(tl.int32), 0) - 1
        tl.store(few_weights + place, weights, mask=is_candidate & (place < WIDE_FEW))
        count += tl.sum(is_candidate.to(tl.int32), 0)
        numbers += (bits >= high).to(tl.int32)
        sums += tl.where(bits >= high, weights, 0.0)
    tl.debug_barrier()
    return count, tl.sum(numbers, 0), tl.sum(sums.to(tl.float64), 0)


@triton.jit
def draw_wide(
    logits,
    words,
    numbers,
    addresses,
    maxima,
    sums,
    few_weights,
    tokens,
    is_valid,
    is_wide,
    sampled_tokens,
    vocab_size,
    ADJUSTS: tl.constexpr,
):
    """``draw`` for the rows that it marked as wide. Overwrites ``maxima`` and ``sums`` of those rows."""
    row = tl.program_id(0)
    if tl.load(is_wide + row) != 0:
        words += row * NUM_WORDS
        numbers += row * NUM_NUMBERS
        addresses += row * NUM_ADDRESSES
        maxima += row * MAX_SUBTILES
        sums += row * MAX_SUBTILES
        few_weights += row * WIDE_FEW
        logits += row.to(tl.int64) * vocab_size
        flags = tl.load(words + FLAGS)
        if ADJUSTS:
            write_changes(logits, flags, words, addresses)
        index = tl.arange(0, MAX_SUBTILES)
        exists = index < tl.cdiv(vocab_size, SUBTILE)
        subtile_maxima = tl.load(maxima + index, mask=exists, other=-INFINITY)
        largest = tl.max(subtile_maxima, 0)
        factor = float_at(words + FACTOR)
        peaks = weigh(subtile_maxima, largest, factor)
        subtile_sums = tl.load(sums + index, mask=exists & (peaks > 0.0), other=0.0)
        total = tl.sum((subtile_sums * peaks).to(tl.float64), 0)
        top_k = tl.load(words + TOP_K)
        top_p = tl.load(numbers + TOP_P)
        min_weight = float_at(words + MIN_WEIGHT)
        threshold = bits_of(min_weight)
        ties = row * 0 + 2147483647
        number = row * 0
        if (top_k > 0) | (min_weight > SMALLEST):
            _, number, total = _gather_between(
                logits, largest, factor, threshold, threshold, few_weights,
                flags, words, addresses, vocab_size, ADJUSTS,
            )  # fmt: skip
        entry = tl.arange(0, WIDE_FEW)
        for rule in range(2):
            by_count = rule == 0
            needed = tl.where(by_count, top_k.to(tl.float64), tl.maximum(top_p * total, SMALLEST))
            if tl.where(by_count, (top_k > 0) & (top_k < number), top_p < 1.0):
                needed32 = needed.to(tl.float32)
                # Were all V weights below this, they would sum to less than top_p leaves out.
                least = bits_of((0.999 * (1.0 - top_p) * total / vocab_size).to(tl.float32))
                low = tl.maximum(threshold, tl.where(by_count, 0, least))
                high = row * 0 + (ONE_BITS + 1)
                count = row * 0 + (WIDE_FEW + 1)
                number_above = row * 0
                sum_above = total * 0.0
                while (count > WIDE_FEW) & (high - low > 1):
                    for _ in range(2):
                        if high - low > 1:
                            low, high = _narrow(
                                logits, largest, factor, low, high, needed32, by_count,
                                flags, words, addresses, vocab_size, ADJUSTS,
                            )  # fmt: skip
                    count, number_above, sum_above = _gather_between(
                        logits, largest, factor, low, high, few_weights,
                        flags, words, addresses, vocab_size, ADJUSTS,
                    )  # fmt: skip
                weights = tl.load(few_weights + entry, mask=entry < count, other=0.0)
                found, number_above, sum_above = find_threshold(
                    weights, low, high, needed32, by_count, number_above, sum_above
                )
                if by_count:
                    ties = top_k - number_above
                    total = sum_above + ties * found.to(tl.float32, bitcast=True).to(tl.float64)
                else:
                    ties = ties_of_sum(needed, number_above, sum_above, found, threshold, ties)
                threshold = found

        tl.debug_barrier()
        block: tl.constexpr = BLOCK // SUBTILE
        for start in range(0, tl.cdiv(vocab_size, SUBTILE), block):
            subtile = start + tl.arange(0, block)
            ids = subtile[:, None] * SUBTILE + tl.arange(0, SUBTILE)[None, :]
            x = values_of(logits, ids, ids < vocab_size, flags, words, addresses, ADJUSTS)
            weights = weigh(x, largest, factor)
            bits = bits_of(weights)
            inside = subtile < MAX_SUBTILES
            tl.store(sums + subtile, tl.sum(tl.where(bits > threshold, weights, 0.0), 1), mask=inside)
            tl.store(maxima + subtile, tl.sum((bits == threshold).to(tl.float32), 1), mask=inside)
        tl.debug_barrier()
        equal = tl.load(maxima + index, mask=exists, other=0.0).to(tl.int32)
        before = tl.cumsum(equal, 0) - equal
        kept_ties = tl.minimum(tl.maximum(ties - before, 0), equal)
        weight = threshold.to(tl.float32, bitcast=True).to(tl.float64)
        masses = tl.load(sums + index, mask=exists, other=0.0).to(tl.float64) + kept_ties * weight
        target = tl.load(numbers + UNIFORM) * tl.sum(masses, 0)
        token = draw_from(
            logits, masses, target, threshold, kept_ties, largest, factor,
            flags, words, addresses, vocab_size, ADJUSTS,
        )  # fmt: skip
        commit(row, token, token >= 0, tokens, is_valid, sampled_tokens, flags, words, addresses, ADJUSTS)
        if ADJUSTS:
            undo_changes(logits, flags, words, addresses)


SPECS = [
    spec(draw_wide, f"sample_wide_{path}{suffix}", 16, {"ADJUSTS": PATHS[path]["ADJUSTS"]}, vocab_size)
    for path in ("drawn", "full")
    for suffix, vocab_size in VOCAB_SIZES.items()
]
