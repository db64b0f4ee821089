"""From logits to tokens on a GPU. ``engine_runtime/sampling.py`` says what is computed; this says how.

A row of V logits is cut into subtiles of 128. ``scan``, a pass at the speed of memory, leaves of each subtile
the largest logit and the sum of the weights ``2 ** ((logit - largest) * factor)``, with factor = log2(e) /
temperature. All else is decided from these few numbers by ``draw``, one program a row, and a look at the
subtiles that matter:

    most likely token    the first subtile with the row's maximum is read again
    plain temperature    the cumulative sum over subtiles names one, which is read again
    top_k, top_p, min_p  k subtiles with a maximum >= t prove that the k-th largest weight is >= t, likewise
                         for sums. Only subtiles with a maximum >= t are read again; what they hold >= t is
                         gathered in the order of token ids, and a bisection over the bits finds the exact
                         threshold, as on the CPU.

A row whose candidates are too many to gather is left to ``draw_wide`` in ``sampling_wide.py``.

Every number of a row is computed from that row alone, in an order that does not depend on the grid, so that a
row gives the same token in any batch.
"""

import triton
import triton.language as tl

from engine_runtime.kernels.triton.sampling_row import (
    CHANGES,
    DRAWS,
    FACTOR,
    FEW,
    FILTERS,
    FLAGS,
    GRAMMAR,
    HAS_CHANGES,
    HAS_GRAMMAR,
    HAS_LOGPROBS,
    INFINITY,
    LOG2_E,
    MAX_CHANGES,
    MAX_QUALIFIED,
    MAX_SUBTILES,
    MIN_WEIGHT,
    NUM_ADDRESSES,
    NUM_CHANGES,
    NUM_NUMBERS,
    NUM_WORDS,
    ONE_BITS,
    PATHS,
    SMALLEST,
    SUBTILE,
    TILE_SUBTILES,
    TOP_K,
    TOP_P,
    UNIFORM,
    VOCAB_SIZES,
    bits_of,
    commit,
    crossing,
    draw_from,
    find_threshold,
    first_place,
    float_at,
    forbid,
    is_finite,
    penalize,
    spec,
    ties_of_sum,
    undo_changes,
    values_of,
    weigh,
    write_changes,
)


@triton.jit
def _add_changes(x, ids, first_id, flags, words, addresses):
    """The same for a tile in registers: x are the logits of ``ids``, which begin at ``first_id``."""
    if (flags & HAS_CHANGES) != 0:
        number = tl.load(words + NUM_CHANGES)
        ids_pointer = tl.load(addresses + CHANGES).to(tl.pointer_type(tl.int32))
        values_pointer = ids_pointer.to(tl.pointer_type(tl.float32)) + MAX_CHANGES
        entry = tl.arange(0, MAX_CHANGES)
        listed = tl.load(ids_pointer + entry, mask=entry < number, other=2147483647)
        first = tl.sum((listed < first_id).to(tl.int32), 0)
        stop = tl.sum((listed < first_id + TILE_SUBTILES * SUBTILE).to(tl.int32), 0)
        for i in range(first, stop):
            x = tl.where(ids == tl.load(ids_pointer + i), x + tl.load(values_pointer + i), x)
    return x


@triton.jit
def _apply_grammar(x, tile, flags, addresses, vocab_size):
    """``adjust``'s part of it, with each word of the bitmask read once."""
    if (flags & HAS_GRAMMAR) != 0:
        grammar = tl.load(addresses + GRAMMAR).to(tl.pointer_type(tl.int32))
        words_per_tile: tl.constexpr = TILE_SUBTILES * SUBTILE // 32
        word = tile * words_per_tile + tl.arange(0, words_per_tile)
        bits = tl.load(grammar + word, mask=word < tl.cdiv(vocab_size, 32), other=0)
        bits = bits[:, None] >> tl.arange(0, 32)[None, :]
        x = forbid(x, tl.reshape(bits, [TILE_SUBTILES, SUBTILE]))
    return x


@triton.jit
def _store_subtiles(x, factor, sums, maxima_out, sums_out, offsets):
    """Maxima and, if ``sums``, sums of weights of the rows of x [subtiles, 128]."""
    x = tl.where(x < INFINITY, x, INFINITY)
    maxima = tl.max(x, 1)
    tl.store(maxima_out + offsets, maxima)
    if sums:
        finite = tl.where(maxima > -INFINITY, maxima, 0.0)
        tl.store(sums_out + offsets, tl.sum(weigh(x, finite[:, None], factor), 1))


@triton.jit
def scan(
    logits,
    words,
    addresses,
    maxima,
    sums,
    raw_maxima,
    raw_sums,
    vocab_size,
    DRAWN: tl.constexpr,
    ADJUSTS: tl.constexpr,
):
    """What ``draw`` and ``report`` need to know of each subtile.

    Grid: (ceil(V / 4096), rows). logits float32 [rows, V]. maxima, sums, raw_maxima, raw_sums float32 [rows,
    2048]: of the logits after all changes at the row's temperature, and of those that came at temperature 1.
    sums only for rows that draw (DRAWN), raw_* only for rows with logprobs (ADJUSTS).
    """
    row = tl.program_id(1)
    tile = tl.program_id(0)
    subtile = tl.arange(0, TILE_SUBTILES)
    ids = (tile * TILE_SUBTILES + subtile)[:, None] * SUBTILE + tl.arange(0, SUBTILE)[None, :]
    mask = ids < vocab_size
    offsets = row * MAX_SUBTILES + tile * TILE_SUBTILES + subtile
    x = tl.load(logits + row.to(tl.int64) * vocab_size + ids, mask=mask, other=-INFINITY)
    words += row * NUM_WORDS
    addresses += row * NUM_ADDRESSES
    flags = 0
    factor = 0.0
    if DRAWN:
        flags = tl.load(words + FLAGS)
        factor = float_at(words + FACTOR)
    if ADJUSTS:
        if (flags & HAS_LOGPROBS) != 0:
            _store_subtiles(x, LOG2_E, True, raw_maxima, raw_sums, offsets)
        x = _add_changes(x, ids, tile * TILE_SUBTILES * SUBTILE, flags, words, addresses)
        x = _apply_grammar(x, tile, flags, addresses, vocab_size)
        x = penalize(x, ids, mask, flags, words, addresses)
    _store_subtiles(x, factor, (flags & DRAWS) != 0, maxima, sums, offsets)


@triton.jit
def _most_likely(logits, maxima, largest, flags, words, addresses, vocab_size, ADJUSTS: tl.constexpr):
    """The lowest token id with the largest logit of a row."""
    subtile = first_place(maxima == largest, tl.arange(0, MAX_SUBTILES), MAX_SUBTILES)
    lane = tl.arange(0, SUBTILE)
    ids = subtile * SUBTILE + lane
    x = values_of(logits, ids, ids < vocab_size, flags, words, addresses, ADJUSTS)
    return subtile * SUBTILE + first_place(x == tl.max(x, 0), lane, SUBTILE)


@triton.jit
def _draw_narrow(
    logits, maxima, masses, largest, factor, subtiles, few_weights, few_ids,
    flags, words, numbers, addresses, vocab_size, ADJUSTS: tl.constexpr,
):  # fmt: skip
    """The token of a row that filters, or -1 if its candidates are too many.

    maxima float32 and masses float64 [2048]: of the subtiles. subtiles int32 [2048], few_weights float32
    [2048] and few_ids int32 [2048]: scratch memory of the row.
    """
    index = tl.arange(0, MAX_SUBTILES)
    top_k = tl.load(words + TOP_K)
    top_p = tl.load(numbers + TOP_P)
    min_weight = float_at(words + MIN_WEIGHT)
    peaks = weigh(maxima, largest, factor)
    total = tl.sum(masses, 0)

    # A lower bound of the final threshold, from the maxima alone. It need not be the best one.
    by_count = top_k > 0
    by_sum = (top_k == 0) & (top_p < 1.0) & (min_weight <= SMALLEST)
    needed = tl.where(by_count, top_k.to(tl.float64), tl.where(by_sum, top_p * total * 1.00001, INFINITY))
    needed32 = needed.to(tl.float32)
    masses32 = masses.to(tl.float32)
    peak_bits = bits_of(peaks)
    lowest = bits_of(min_weight)
    low = lowest
    high = low * 0 + (ONE_BITS + 1)
    for _ in range(14):
        middle = (low + high) // 2
        # A subtile with a maximum >= t holds less than 127 t in weights < t.
        below = (SUBTILE - 1) * middle.to(tl.float32, bitcast=True)
        values = tl.where(by_count, 1.0, tl.maximum(peaks, masses32 - below))
        is_enough = tl.sum(tl.where(peak_bits >= middle, values, 0.0), 0) >= needed32
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    # Hardware exponentials need not be monotonous in their last bits.
    bound = low.to(tl.float32, bitcast=True) * (1.0 - 2.0**-16)
    qualifies = (peaks >= bound) & (peaks > 0.0)
    num_qualified = tl.sum(qualifies.to(tl.int32), 0)
    token = num_qualified * 0 - 1
    if num_qualified <= MAX_QUALIFIED:
        tl.store(subtiles + tl.cumsum(qualifies.to(tl.int32), 0) - 1, index, mask=qualifies)
        tl.debug_barrier()
        entry = tl.arange(0, FEW)
        count = num_qualified * 0
        first = num_qualified * 0
        while (first < num_qualified) & (count <= FEW):
            position = first + entry // SUBTILE
            inside = position < num_qualified
            ids = tl.load(subtiles + position, mask=inside, other=0) * SUBTILE + entry % SUBTILE
            inside = inside & (ids < vocab_size)
            x = values_of(logits, ids, inside, flags, words, addresses, ADJUSTS)
            weights = weigh(x, largest, factor)
            is_candidate = inside & (weights >= bound) & (weights >= min_weight)
            place = count + tl.cumsum(is_candidate.to(tl.int32), 0) - 1
            is_stored = is_candidate & (place < FEW)
            tl.store(few_weights + place, weights, mask=is_stored)
            tl.store(few_ids + place, ids, mask=is_stored)
            count += tl.sum(is_candidate.to(tl.int32), 0)
            first += FEW // SUBTILE
        if count <= FEW:
            tl.debug_barrier()
            weights = tl.load(few_weights + entry, mask=entry < count, other=0.0)
            bits = bits_of(weights)
            none = count * 0
            no_sum = total * 0.0
            ties = count
            threshold = lowest
            low = tl.maximum(lowest, bits_of(bound))
            high = none + (ONE_BITS + 1)
            if by_sum == 0:
                total = tl.sum(weights.to(tl.float64), 0)
            for rule in range(2):
                is_count = rule == 0
                needed = tl.where(is_count, top_k.to(tl.float64), tl.maximum(top_p * total, SMALLEST))
                if tl.where(is_count, by_count & (top_k < count), top_p < 1.0):
                    found, number_above, sum_above = find_threshold(
                        weights, low, high, needed.to(tl.float32), is_count, none, no_sum
                    )
                    if is_count:
                        ties = top_k - number_above
                        total = sum_above + ties * found.to(tl.float32, bitcast=True).to(tl.float64)
                    else:
                        ties = ties_of_sum(needed, number_above, sum_above, found, threshold, ties)
                    threshold = found
                    low = tl.maximum(low, found)
            equal = (bits == threshold).to(tl.int32)
            rank = tl.cumsum(equal, 0) - equal
            is_kept = (bits > threshold) | ((equal != 0) & (rank < ties))
            kept = tl.where(is_kept, weights, 0.0).to(tl.float64)
            target = tl.load(numbers + UNIFORM) * tl.sum(kept, 0)
            chosen = crossing(tl.cumsum(kept, 0), kept, target, FEW)
            token = tl.load(few_ids + chosen)
    return token


@triton.jit
def draw(
    logits,
    words,
    numbers,
    addresses,
    maxima,
    sums,
    subtiles,
    few_weights,
    few_ids,
    tokens,
    is_valid,
    is_wide,
    sampled_tokens,
    vocab_size,
    DRAWN: tl.constexpr,
    ADJUSTS: tl.constexpr,
):
    """A token for each row, but for those that it marks as wide.

    Grid: (rows,). maxima and sums as ``scan`` left them. subtiles int32 [rows, 2048], few_weights float32
    and few_ids int32 [rows, 2048]: scratch. tokens, is_valid, is_wide int32 [rows]; a row whose logits
    are not finite is not valid and gets token 0. sampled_tokens int32 [slots].
    """
    row = tl.program_id(0)
    words += row * NUM_WORDS
    numbers += row * NUM_NUMBERS
    addresses += row * NUM_ADDRESSES
    logits += row.to(tl.int64) * vocab_size
    flags = tl.load(words + FLAGS)
    if ADJUSTS:
        write_changes(logits, flags, words, addresses)
    index = tl.arange(0, MAX_SUBTILES)
    exists = index < tl.cdiv(vocab_size, SUBTILE)
    subtile_maxima = tl.load(maxima + row * MAX_SUBTILES + index, mask=exists, other=-INFINITY)
    largest = tl.max(subtile_maxima, 0)
    finite = is_finite(largest)
    token = row * 0
    if finite:
        if DRAWN:
            if (flags & DRAWS) != 0:
                factor = float_at(words + FACTOR)
                peaks = weigh(subtile_maxima, largest, factor)
                subtile_sums = tl.load(
                    sums + row * MAX_SUBTILES + index, mask=exists & (peaks > 0.0), other=0.0
                )
                masses = (subtile_sums * peaks).to(tl.float64)
                if (flags & FILTERS) != 0:
                    token = _draw_narrow(
                        logits, subtile_maxima, masses, largest, factor, subtiles + row * MAX_SUBTILES,
                        few_weights + row * FEW, few_ids + row * FEW,
                        flags, words, numbers, addresses, vocab_size, ADJUSTS,
                    )  # fmt: skip
                else:
                    target = tl.load(numbers + UNIFORM) * tl.sum(masses, 0)
                    token = draw_from(
                        logits, masses, target, row * 0, index * 0, largest, factor,
                        flags, words, addresses, vocab_size, ADJUSTS,
                    )  # fmt: skip
            else:
                token = _most_likely(
                    logits, subtile_maxima, largest, flags, words, addresses, vocab_size, ADJUSTS
                )
        else:
            token = _most_likely(
                logits, subtile_maxima, largest, flags, words, addresses, vocab_size, ADJUSTS
            )
    if DRAWN:
        tl.store(is_wide + row, (token < 0).to(tl.int32))
    if token >= 0:
        commit(row, token, finite, tokens, is_valid, sampled_tokens, flags, words, addresses, ADJUSTS)
    if ADJUSTS:
        undo_changes(logits, flags, words, addresses)


SPECS = [
    *(
        spec(scan, f"sample_scan_{path}{suffix}", 8 if path == "full" else 4, constexprs, vocab_size)
        for path, constexprs in PATHS.items()
        for suffix, vocab_size in VOCAB_SIZES.items()
    ),
    *(spec(draw, f"sample_draw_{path}", 8, constexprs) for path, constexprs in PATHS.items()),
]
