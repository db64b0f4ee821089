"""Choosing tokens from logits on a CPU: the compiled part.

Nothing is sorted. The weights of a row, ``exp((logit - max) / temperature)``, are kept in index order, and
each of min_p, top_k and top_p becomes a threshold: the largest weight t such that the tokens of weight >= t
satisfy the rule. Positive floats order like their bits, so a bisection over the bits finds t exactly, in at
most 31 passes at the speed of the second-level cache; as soon as few tokens lie between the bounds, only
those are looked at. Of tokens that weigh exactly t as many are kept as the rule needs, lowest ids first. The
token is then the inverse of the cumulative sum, in index order, at a uniform random number.
"""

from __future__ import annotations

import numpy as np

from engine_runtime.kernels.cpu_compile import kernel
from engine_runtime.kernels.cpu_simd import (
    LANES,
    add,
    bits_of,
    count_at_least,
    count_not_below,
    exp2,
    float_of,
    keep_at_least,
    load,
    max_lanes,
    maximum,
    multiply,
    splat,
    store,
    subtract,
    sum_lanes,
)
from engine_runtime.kernels.numpy_types import Float32Array, Float64Array, Int32Array

FEW = 1024
BLOCK = 256
LOG2_E = np.float32(1.4426950408889634)
NEGATIVE_INFINITY = np.float32(-np.inf)
INFINITY = np.float32(np.inf)
ZERO = np.float32(0.0)
SMALLEST = np.float32(2.0**-126)  # weights are normal numbers or zero
ONE_BITS = 0x3F800000  # 1.0, the largest weight
GUESS_BITS = 0x39800000  # 2**-12: most thresholds lie above it


@kernel
def find_maxima(
    logits: Float32Array,
    first_row: int,
    last_row: int,
    maxima: Float32Array,
    token_ids: Int32Array,
    is_valid: Int32Array,
) -> None:
    """The largest logit of each row and the lowest token id that has it.

    A row with NaN, +inf or no finite logit is not valid.
    """
    vocab_size = logits.shape[1]
    whole = vocab_size // LANES * LANES
    for row in range(first_row, last_row):
        start = row * vocab_size
        a = splat(NEGATIVE_INFINITY)
        b = splat(NEGATIVE_INFINITY)
        bad = 0
        i = 0
        while i + 2 * LANES <= whole:
            x = load(logits, start + i)
            y = load(logits, start + i + LANES)
            a = maximum(x, a)
            b = maximum(y, b)
            bad += count_not_below(x, INFINITY) + count_not_below(y, INFINITY)
            i += 2 * LANES
        if i < whole:
            x = load(logits, start + i)
            a = maximum(x, a)
            bad += count_not_below(x, INFINITY)
        largest = max_lanes(maximum(a, b))
        for j in range(whole, vocab_size):
            value = logits[row, j]
            if value > largest:
                largest = value
            if not value < INFINITY:
                bad += 1
        maxima[row] = largest
        if bad > 0 or largest == NEGATIVE_INFINITY:
            is_valid[row] = 0
            token_ids[row] = 0
            continue
        is_valid[row] = 1
        i = 0
        while i < whole and count_at_least(load(logits, start + i), largest) == 0:
            i += LANES
        while logits[row, i] != largest:
            i += 1
        token_ids[row] = i


@kernel
def weigh(
    logits: Float32Array,
    row: int,
    largest: float,
    inverse_temperature: float,
    weights: Float32Array,
    block_sums: Float64Array,
) -> float:
    """weights[i] = exp((logits[row, i] - largest) * inverse_temperature), zero past the vocabulary.

    Returns their sum. ``block_sums`` receives the sum of each 256; ``weights`` is padded to whole blocks.
    """
    vocab_size = logits.shape[1]
    whole = vocab_size // LANES * LANES
    start = row * vocab_size
    shift = splat(np.float32(largest))
    factor = splat(np.float32(inverse_temperature) * LOG2_E)
    for i in range(0, whole, LANES):
        store(weights, i, exp2(multiply(subtract(load(logits, start + i), shift), factor)))
    if whole < vocab_size:
        for i in range(whole, vocab_size):
            weights[i] = logits[row, i]
        for i in range(vocab_size, whole + LANES):
            weights[i] = NEGATIVE_INFINITY
        store(weights, whole, exp2(multiply(subtract(load(weights, whole), shift), factor)))
    for i in range((vocab_size + LANES - 1) // LANES * LANES, len(weights)):
        weights[i] = ZERO
    total: float = _sum_blocks(weights, block_sums)
    return total


@kernel
def _sum_blocks(weights: Float32Array, block_sums: Float64Array) -> float:
    total = 0.0
    for block in range(len(block_sums)):
        partial = splat(ZERO)
        for i in range(block * BLOCK, (block + 1) * BLOCK, LANES):
            partial = add(partial, load(weights, i))
        block_sums[block] = sum_lanes(partial)
        total += block_sums[block]
    return total


@kernel
def _sum_at_least(weights: Float32Array, count: int, threshold: float) -> tuple[int, float]:
    """How many of the first ``count`` weights are >= threshold, and their sum; a multiple of 16."""
    number = 0
    total = 0.0
    i = 0
    while i < count:
        stop = min(i + 16 * BLOCK, count)
        a = splat(ZERO)
        while i < stop:
            w = load(weights, i)
            number += count_at_least(w, threshold)
            a = add(a, keep_at_least(w, threshold))
            i += LANES
        total += sum_lanes(a)
    return number, total


@kernel
def _gather_between(
    weights: Float32Array,
    count: int,
    low: float,
    high: float,
    few_weights: Float32Array,
    few_ids: Int32Array,
) -> int:
    """Copies those of the first ``count`` weights that are in [low, high), with their indices, in order.

    Returns how many. Zero weights are appended up to the next multiple of 16.
    """
    number = 0
    for i in range(0, count, LANES):
        if count_at_least(load(weights, i), low) > 0:
            for j in range(i, min(i + LANES, count)):
                few_weights[number] = weights[j]  # without a branch: which weights qualify is unpredictable
                few_ids[number] = j
                number += int(low <= weights[j]) & int(weights[j] < high)
    for i in range(number, (number + LANES - 1) // LANES * LANES):
        few_weights[i] = ZERO
    return number


@kernel
def _find_threshold(
    weights: Float32Array,
    count: int,
    lowest: float,
    min_count: int,
    min_sum: float,
    few_weights: Float32Array,
    few_ids: Int32Array,
) -> tuple[float, int, float]:
    """The largest t >= lowest such that at least ``min_count`` weights are >= t, with a sum of ``min_sum``.

    ``lowest`` is taken to satisfy that. Also returns how many weights are > t, and their sum. Overwrites
    few_weights and few_ids.
    """
    low = bits_of(lowest)  # satisfies the condition
    high = ONE_BITS + 1  # does not
    number_above = 0  # weights of at least ``high``, and their sum
    sum_above = 0.0
    values = weights
    length = (count + LANES - 1) // LANES * LANES
    number_gathered_above = 0  # the part of ``number_above`` that is not among ``values``
    sum_gathered_above = 0.0
    number_low = count
    candidates = count
    while high - low > 1:
        if candidates <= FEW < length:
            number_gathered_above = number_above
            sum_gathered_above = sum_above
            number = _gather_between(
                weights,
                count,
                float_of(low),
                float_of(high),
                few_weights,
                few_ids,
            )
            values = few_weights
            length = (number + LANES - 1) // LANES * LANES
        middle = (low + high) // 2 if low >= GUESS_BITS or high <= GUESS_BITS else GUESS_BITS
        number, total = _sum_at_least(values, length, float_of(middle))
        number += number_gathered_above
        total += sum_gathered_above
        if number >= min_count and total >= min_sum:
            low = middle
            number_low = number
        else:
            high = middle
            number_above = number
            sum_above = total
        candidates = number_low - number_above
    return float_of(low), number_above, sum_above


@kernel
def draw(
    logits: Float32Array,
    row: int,
    largest: float,
    inverse_temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
    weights: Float32Array,
    block_sums: Float64Array,
    few_weights: Float32Array,
    few_ids: Int32Array,
) -> int:
    """A token of the row: softmax at a temperature, cut by min_p, then top_k, then top_p of what top_k left.

    ``uniform`` in [0, 1) picks the token; ``largest`` is the row's largest logit.
    """
    vocab_size = logits.shape[1]
    total = weigh(logits, row, largest, inverse_temperature, weights, block_sums)
    if top_k > 0 or top_p < 1.0 or min_p > 0.0:
        threshold = max(np.float32(min_p), SMALLEST)
        number, total = _sum_at_least(weights, len(weights), threshold)
        ties = number
        if 0 < top_k < number:
            threshold, above, total = _find_threshold(
                weights, vocab_size, threshold, top_k, 0.0, few_weights, few_ids
            )
            ties = top_k - above
            total += ties * np.float64(threshold)
        if top_p < 1.0:
            needed = top_p * total
            new_threshold, above, total = _find_threshold(
                weights, vocab_size, threshold, 1, needed, few_weights, few_ids
            )
            needed_ties = max(1 - above, np.int64(np.ceil((needed - total) / np.float64(new_threshold))))
            ties = needed_ties if new_threshold > threshold else min(ties, needed_ties)
            threshold = new_threshold
        _drop_below(weights, threshold, ties)
        total = _sum_blocks(weights, block_sums)
    token: int = _walk(weights, block_sums, uniform * total)
    return token


@kernel
def draw_rows(
    logits: Float32Array,
    maxima: Float32Array,
    rows: Int32Array,
    inverse_temperatures: Float64Array,
    top_ks: Int32Array,
    top_ps: Float64Array,
    min_ps: Float64Array,
    uniforms: Float64Array,
    weights: Float32Array,
    block_sums: Float64Array,
    few_weights: Float32Array,
    few_ids: Int32Array,
    token_ids: Int32Array,
) -> None:
    """token_ids[rows[i]] = a token of row rows[i], drawn with the parameters at i."""
    for i in range(len(rows)):
        row = int(rows[i])
        token_ids[row] = draw(
            logits, row, maxima[row], inverse_temperatures[i], top_ks[i], top_ps[i], min_ps[i], uniforms[i],
            weights, block_sums, few_weights, few_ids,
        )  # fmt: skip


@kernel
def _drop_below(weights: Float32Array, threshold: float, ties: int) -> None:
    """Clears the weights < threshold, and those equal to it but for the first ``ties``."""
    for i in range(0, len(weights), LANES):
        store(weights, i, keep_at_least(load(weights, i), threshold))
    number_equal = 0
    for i in range(len(weights)):
        number_equal += weights[i] == threshold
    if number_equal > ties:
        for i in range(len(weights)):
            if weights[i] == threshold:
                if ties > 0:
                    ties -= 1
                else:
                    weights[i] = ZERO


@kernel
def _walk(weights: Float32Array, block_sums: Float64Array, target: float) -> int:
    """The first index at which the cumulative sum exceeds ``target``; never one of weight 0."""
    block = 0
    for i in range(len(block_sums)):
        if block_sums[i] > 0.0:
            block = i
            if block_sums[i] > target:
                break
            target -= block_sums[i]
    token = 0
    for i in range(block * BLOCK, (block + 1) * BLOCK):
        if weights[i] > ZERO:
            token = i
            target -= weights[i]
            if target < 0.0:
                break
    return token


@kernel
def report(
    logits: Float32Array,
    row: int,
    largest: float,
    token_id: int,
    top_n: int,
    weights: Float32Array,
    block_sums: Float64Array,
    few_weights: Float32Array,
    few_ids: Int32Array,
    top_ids: Int32Array,
    top_logprobs: Float64Array,
) -> tuple[float, int]:
    """Log-probability and rank of a token, and the ``top_n`` most likely, equal ones by token id."""
    vocab_size = logits.shape[1]
    total = weigh(logits, row, largest, np.float32(1.0), weights, block_sums)
    offset = np.float64(largest) + np.log(total)
    logit = logits[row, token_id]
    rank = 1
    for i in range(vocab_size):
        rank += logits[row, i] > logit
    if top_n > 0:
        threshold, _, _ = _find_threshold(weights, vocab_size, ZERO, top_n, 0.0, few_weights, few_ids)
        number = _gather_between(weights, vocab_size, threshold, INFINITY, few_weights, few_ids)
        for n in range(top_n):
            best = -1
            for i in range(number):
                if few_ids[i] >= 0 and (best < 0 or logits[row, few_ids[i]] > logits[row, few_ids[best]]):
                    best = i
            top_ids[n] = few_ids[best]
            top_logprobs[n] = np.float64(logits[row, few_ids[best]]) - offset
            few_ids[best] = -1
    return np.float64(logit) - offset, rank


@kernel
def apply_mask(logits: Float32Array, row: int, mask: Int32Array) -> None:
    """Forbids the tokens whose bit in ``mask`` is not set, least significant bit first."""
    vocab_size = logits.shape[1]
    for word in range((vocab_size + 31) // 32):
        bits = mask[word]
        if bits != -1:
            first = word * 32
            for bit in range(min(32, vocab_size - first)):
                if (bits >> bit) & 1 == 0:
                    logits[row, first + bit] = NEGATIVE_INFINITY


@kernel
def apply_penalties(
    logits: Float32Array,
    row: int,
    token_ids: Int32Array,
    num_prompt_tokens: int,
    presence: float,
    frequency: float,
    repetition: float,
    counts: Int32Array,
    is_seen: Int32Array,
) -> None:
    """Changes the logits of tokens that occurred; ``counts`` and ``is_seen`` are zero before and after."""
    vocab_size = logits.shape[1]
    for i in range(num_prompt_tokens, len(token_ids)):
        if 0 <= token_ids[i] < vocab_size:
            counts[token_ids[i]] += 1
    for i in range(len(token_ids)):
        token = token_ids[i]
        if 0 <= token < vocab_size and is_seen[token] == 0:
            is_seen[token] = 1
            logit = logits[row, token]
            logit = logit / np.float32(repetition) if logit > ZERO else logit * np.float32(repetition)
            if counts[token] > 0:
                logit -= np.float32(frequency) * np.float32(counts[token]) + np.float32(presence)
            logits[row, token] = logit
    for i in range(len(token_ids)):
        if 0 <= token_ids[i] < vocab_size:
            counts[token_ids[i]] = 0
            is_seen[token_ids[i]] = 0
