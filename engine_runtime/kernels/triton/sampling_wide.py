"""``draw_wide``: the rows that filter and have too many candidates for ``draw``.

A sample of the row tells about where the threshold is. A pass over the row sums what is above each of eight
pivots around that place, the next one gathers what lies between the two pivots that enclose the threshold. If
the sample was misleading or that is still too much, the interval is cut into nine, and so on.
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
    finish_values,
    float_at,
    spec,
    ties_of_sum,
    undo_changes,
    values_of,
    weigh,
    write_changes,
)

COLUMNS = tl.constexpr(2048)
"""A multiple of what the threads of a program load at a time, so that each sums its own columns."""
ROWS = tl.constexpr(4)
BLOCK = tl.constexpr(8192)
SAMPLE = tl.constexpr(8192)


@triton.jit
def _guess(
    logits, largest, factor, low, high, share, by_count, flags, words, addresses, vocab_size,
    ADJUSTS: tl.constexpr,
):  # fmt: skip
    """Bits above which about ``share`` of the row is, and how many bits the standard deviation of that is."""
    entry = tl.arange(0, SAMPLE)
    ids = (entry // 32) * (vocab_size // (SAMPLE // 32)) + entry % 32
    x = values_of(logits, ids, ids < vocab_size, flags, words, addresses, ADJUSTS)
    weights = weigh(x, largest, factor)
    bits = bits_of(weights)
    values = tl.where(by_count & (bits > 0), 1.0, weights)
    total = tl.sum(values, 0)
    for _ in range(12):
        middle = (low + high) // 2
        is_enough = tl.sum(tl.where(bits >= middle, values, 0.0), 0) >= share * total
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    variance = tl.maximum(share * (1.0 - share), 1e-4) * tl.sum(values * values, 0)
    quarter_octave: tl.constexpr = 1 << 21
    is_near = (bits > low - quarter_octave) & (bits < low + quarter_octave)
    near = tl.sum(tl.where(is_near, values, 0.0), 0)
    deviation = tl.sqrt(variance) / tl.maximum(near, 1e-30) * (2.0 * quarter_octave)
    return low, tl.minimum(tl.maximum(deviation, 64.0), 1.0 * quarter_octave)


@triton.jit
def _pivot(low, high, is_guided, center, deviation, OFFSET: tl.constexpr, NUMBER: tl.constexpr):
    guided = center + (OFFSET * deviation).to(tl.int32)
    pivot = tl.where(is_guided, guided, low + NUMBER * tl.maximum((high - low) // 9, 1))
    return tl.minimum(tl.maximum(pivot, low + 1), high)


@triton.jit
def _tail(bits, values, pivot):
    """Of each column: the sum of the values whose bits are >= pivot."""
    return tl.sum(tl.where(bits >= pivot, values, 0.0), 0)


@triton.jit
def _narrow(
    logits, largest, factor, low, high, needed, by_count, is_guided, center, deviation,
    flags, words, addresses, vocab_size, ADJUSTS: tl.constexpr,
):  # fmt: skip
    """The part of [low, high) that ``find_threshold`` would find its answer in, by one pass over the row."""
    p0 = _pivot(low, high, is_guided, center, deviation, -3.0, 1)
    p1 = _pivot(low, high, is_guided, center, deviation, -1.5, 2)
    p2 = _pivot(low, high, is_guided, center, deviation, -0.7, 3)
    p3 = _pivot(low, high, is_guided, center, deviation, -0.2, 4)
    p4 = _pivot(low, high, is_guided, center, deviation, 0.2, 5)
    p5 = _pivot(low, high, is_guided, center, deviation, 0.7, 6)
    p6 = _pivot(low, high, is_guided, center, deviation, 1.5, 7)
    p7 = _pivot(low, high, is_guided, center, deviation, 3.0, 8)
    zeros = tl.zeros([COLUMNS], tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7 = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    ids = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    loaded = tl.load(logits + ids, mask=ids < vocab_size, other=-INFINITY)
    for start in range(0, vocab_size, ROWS * COLUMNS):
        here = start + ids
        following = here + ROWS * COLUMNS
        x = finish_values(loaded, here, here < vocab_size, flags, words, addresses, ADJUSTS)
        loaded = tl.load(logits + following, mask=following < vocab_size, other=-INFINITY)
        weights = weigh(x, largest, factor)
        bits = bits_of(weights)
        values = tl.where(by_count & (bits > 0), 1.0, weights)
        s0 += _tail(bits, values, p0)
        s1 += _tail(bits, values, p1)
        s2 += _tail(bits, values, p2)
        s3 += _tail(bits, values, p3)
        s4 += _tail(bits, values, p4)
        s5 += _tail(bits, values, p5)
        s6 += _tail(bits, values, p6)
        s7 += _tail(bits, values, p7)
    new_low, new_high = low, p0
    new_low, new_high = _step(s0, needed, p0, p1, new_low, new_high)
    new_low, new_high = _step(s1, needed, p1, p2, new_low, new_high)
    new_low, new_high = _step(s2, needed, p2, p3, new_low, new_high)
    new_low, new_high = _step(s3, needed, p3, p4, new_low, new_high)
    new_low, new_high = _step(s4, needed, p4, p5, new_low, new_high)
    new_low, new_high = _step(s5, needed, p5, p6, new_low, new_high)
    new_low, new_high = _step(s6, needed, p6, p7, new_low, new_high)
    return _step(s7, needed, p7, high, new_low, new_high)


@triton.jit
def _step(sums, needed, pivot, next_pivot, low, high):
    """The interval that begins at the pivot if what is above it is enough."""
    is_enough = tl.sum(sums, 0) >= needed
    return tl.where(is_enough, pivot, low), tl.where(is_enough, next_pivot, high)


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
        whole = total
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
                share = needed / tl.where(by_count, number.to(tl.float64), whole)
                center, deviation = _guess(
                    logits, largest, factor, low, high, share.to(tl.float32), by_count,
                    flags, words, addresses, vocab_size, ADJUSTS,
                )  # fmt: skip
                is_guided = row >= 0
                while (count > WIDE_FEW) & (high - low > 1):
                    for _ in range(tl.where(is_guided, 1, 2)):
                        if high - low > 1:
                            low, high = _narrow(
                                logits, largest, factor, low, high, needed32, by_count,
                                is_guided, center, deviation, flags, words, addresses, vocab_size, ADJUSTS,
                            )  # fmt: skip
                    is_guided = row < 0
                    count, number_above, sum_above = _gather_between(
                        logits, largest, factor, low, high, few_weights,
                        flags, words, addresses, vocab_size, ADJUSTS,
                    )  # fmt: skip
                # If they are too many, the interval holds one value.
                mask = (entry < count) & (count <= WIDE_FEW)
                weights = tl.load(few_weights + entry, mask=mask, other=0.0)
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
