"""What the sampling kernels share: how a row's parameters are laid out, and operations on one row.

``sampling.py`` explains the method.
"""

import triton
import triton.language as tl

from engine_runtime.kernels import sampling_layout as layout
from engine_runtime.kernels.kernel_spec import KernelSpec

SUBTILE = tl.constexpr(layout.SUBTILE)
MAX_SUBTILES = tl.constexpr(layout.MAX_SUBTILES)
TILE_SUBTILES = tl.constexpr(layout.TILE_SUBTILES)
FEW = tl.constexpr(layout.FEW)
MAX_TOP = tl.constexpr(layout.MAX_TOP)
MAX_CHANGES = tl.constexpr(layout.MAX_CHANGES)
COUNT_BITS = tl.constexpr(layout.COUNT_BITS)

NUM_WORDS = tl.constexpr(layout.NUM_WORDS)
FLAGS = tl.constexpr(layout.FLAGS)
SLOT = tl.constexpr(layout.SLOT)
FACTOR = tl.constexpr(layout.FACTOR)
TOP_K = tl.constexpr(layout.TOP_K)
MIN_WEIGHT = tl.constexpr(layout.MIN_WEIGHT)
TOP_N = tl.constexpr(layout.TOP_N)
TARGET = tl.constexpr(layout.TARGET)
NUM_CHANGES = tl.constexpr(layout.NUM_CHANGES)
REPETITION = tl.constexpr(layout.REPETITION)
FREQUENCY = tl.constexpr(layout.FREQUENCY)
PRESENCE = tl.constexpr(layout.PRESENCE)

NUM_NUMBERS = tl.constexpr(layout.NUM_NUMBERS)
TOP_P = tl.constexpr(layout.TOP_P)
UNIFORM = tl.constexpr(layout.UNIFORM)
NUM_ADDRESSES = tl.constexpr(layout.NUM_ADDRESSES)
COUNTS = tl.constexpr(layout.COUNTS)
CHANGES = tl.constexpr(layout.CHANGES)
GRAMMAR = tl.constexpr(layout.GRAMMAR)

DRAWS = tl.constexpr(layout.DRAWS)
FILTERS = tl.constexpr(layout.FILTERS)
HAS_CHANGES = tl.constexpr(layout.HAS_CHANGES)
HAS_PENALTIES = tl.constexpr(layout.HAS_PENALTIES)
HAS_GRAMMAR = tl.constexpr(layout.HAS_GRAMMAR)
HAS_LOGPROBS = tl.constexpr(layout.HAS_LOGPROBS)

MAX_QUALIFIED = tl.constexpr(1024)
"""Subtiles that ``draw`` is willing to read again."""
WIDE_FEW = tl.constexpr(layout.WIDE_FEW)

INFINITY = tl.constexpr(float("inf"))
ONE_BITS = tl.constexpr(0x3F800000)
SMALLEST = tl.constexpr(2.0**-126)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def float_at(pointer):
    return tl.load(pointer).to(tl.float32, bitcast=True)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def weigh(x, largest, factor):
    """2 ** ((x - largest) * factor), at most 1; normal numbers or zero."""
    exponent = (x - largest) * factor
    return tl.where(exponent < -126.0, 0.0, tl.minimum(tl.exp2(exponent), 1.0))


@triton.jit
def forbid(x, bits):
    """-inf where the lowest of ``bits`` is 0. What is not finite stays so."""
    return tl.where(((bits & 1) == 0) & (x < INFINITY), -INFINITY, x)


@triton.jit
def adjust(x, ids, mask, flags, words, addresses):
    """Logits after the grammar and the penalties."""
    if (flags & HAS_GRAMMAR) != 0:
        grammar = tl.load(addresses + GRAMMAR).to(tl.pointer_type(tl.int32))
        x = forbid(x, tl.load(grammar + ids // 32, mask=mask, other=0) >> (ids % 32))
    return penalize(x, ids, mask, flags, words, addresses)


@triton.jit
def penalize(x, ids, mask, flags, words, addresses):
    """Logits after the penalties."""
    if (flags & HAS_PENALTIES) != 0:
        counts = tl.load(addresses + COUNTS).to(tl.pointer_type(tl.int16))
        repetition = float_at(words + REPETITION)
        inverse = tl.div_rn(1.0, repetition)
        count = tl.load(counts + ids, mask=mask, other=0).to(tl.int32)
        quotient = x * inverse  # then made that of an IEEE division
        quotient = tl.fma(tl.fma(-quotient, repetition, x), inverse, quotient)
        scaled = tl.where(x > 0.0, quotient, x * repetition)
        x = tl.where(count != 0, scaled, x)
        used = count & COUNT_BITS
        penalty = tl.fma(float_at(words + FREQUENCY), used.to(tl.float32), float_at(words + PRESENCE))
        x = tl.where(used > 0, x - penalty, x)
    return x


@triton.jit
def values_of(logits, ids, mask, flags, words, addresses, ADJUSTS: tl.constexpr):
    """Logits of a row as the choice sees them; NaN becomes +inf. ``write_changes`` was called before."""
    x = tl.load(logits + ids, mask=mask, other=-INFINITY)
    return finish_values(x, ids, mask, flags, words, addresses, ADJUSTS)


@triton.jit
def finish_values(x, ids, mask, flags, words, addresses, ADJUSTS: tl.constexpr):
    """``values_of`` for logits that are loaded already."""
    if ADJUSTS:
        x = adjust(x, ids, mask, flags, words, addresses)
    return tl.where(x < INFINITY, x, INFINITY)


@triton.jit
def write_changes(logits, flags, words, addresses):
    """Adds the listed values (-inf for forbidden tokens) to the logits in memory and keeps the old ones."""
    if (flags & HAS_CHANGES) != 0:
        number = tl.load(words + NUM_CHANGES)
        ids_pointer = tl.load(addresses + CHANGES).to(tl.pointer_type(tl.int32))
        values_pointer = ids_pointer.to(tl.pointer_type(tl.float32)) + MAX_CHANGES
        entry = tl.arange(0, MAX_CHANGES)
        mask = entry < number
        ids = tl.load(ids_pointer + entry, mask=mask, other=0)
        values = tl.load(values_pointer + entry, mask=mask, other=0.0)
        old = tl.load(logits + ids, mask=mask, other=0.0)
        tl.store(values_pointer + MAX_CHANGES + entry, old, mask=mask)
        tl.store(logits + ids, old + values, mask=mask)
        tl.debug_barrier()


@triton.jit
def undo_changes(logits, flags, words, addresses):
    if (flags & HAS_CHANGES) != 0:
        tl.debug_barrier()
        number = tl.load(words + NUM_CHANGES)
        ids_pointer = tl.load(addresses + CHANGES).to(tl.pointer_type(tl.int32))
        values_pointer = ids_pointer.to(tl.pointer_type(tl.float32)) + MAX_CHANGES
        entry = tl.arange(0, MAX_CHANGES)
        mask = entry < number
        ids = tl.load(ids_pointer + entry, mask=mask, other=0)
        tl.store(logits + ids, tl.load(values_pointer + MAX_CHANGES + entry, mask=mask, other=0.0), mask=mask)


@triton.jit
def is_finite(largest):
    return (largest < INFINITY) & (largest > -INFINITY)


@triton.jit
def first_place(hit, index, NONE: tl.constexpr):
    """The lowest index where ``hit``; NONE if nowhere."""
    return tl.min(tl.where(hit, index, NONE), 0)


@triton.jit
def crossing(cumulative, masses, target, NUMBER: tl.constexpr):
    """The first place at which the cumulative sum exceeds ``target``: never one of mass 0."""
    index = tl.arange(0, NUMBER)
    place = first_place((cumulative > target) & (masses > 0.0), index, NUMBER)
    return tl.where(place < NUMBER, place, tl.max(tl.where(masses > 0.0, index, 0), 0))


@triton.jit
def draw_from(
    logits, masses, target, threshold, ties, largest, factor, flags, words, addresses, vocab_size,
    ADJUSTS: tl.constexpr,
):  # fmt: skip
    """The token at which the cumulative sum of what is kept exceeds ``target``.

    masses float64 [2048]: what is kept of each subtile. Kept are weights with bits > threshold, and of each
    subtile the first ``ties`` int32 [2048] that equal it.
    """
    index = tl.arange(0, MAX_SUBTILES)
    cumulative = tl.cumsum(masses, 0)
    subtile = crossing(cumulative, masses, target, MAX_SUBTILES)
    here = index == subtile
    rest = target - tl.sum(tl.where(here, cumulative - masses, 0.0), 0)
    num_ties = tl.sum(tl.where(here, ties, 0), 0)
    lane = tl.arange(0, SUBTILE)
    ids = subtile * SUBTILE + lane
    x = values_of(logits, ids, ids < vocab_size, flags, words, addresses, ADJUSTS)
    weights = weigh(x, largest, factor)
    equal = (bits_of(weights) == threshold).to(tl.int32)
    rank = tl.cumsum(equal, 0) - equal
    is_kept = (bits_of(weights) > threshold) | ((equal != 0) & (rank < num_ties))
    kept = tl.where(is_kept, weights, 0.0).to(tl.float64)
    return subtile * SUBTILE + crossing(tl.cumsum(kept, 0), kept, rest, SUBTILE)


@triton.jit
def find_threshold(weights, low, high, needed, by_count, number_above, sum_above):
    """The largest bits t in [low, high) such that the weights >= t, and those above, reach ``needed``.

    Args:
        weights: float32, those in [low, high). number_above, sum_above: of those that are not among them.
        needed: how many if ``by_count``, else which sum. ``low`` is taken to satisfy that, ``high`` not to.

    Returns:
        t, how many weights are > t, their sum (float64).
    """
    bits = bits_of(weights)
    values = tl.where(by_count & (bits > 0), 1.0, weights)
    above = tl.where(by_count, number_above.to(tl.float32), sum_above.to(tl.float32))
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = above + tl.sum(tl.where(bits >= middle, values, 0.0), 0) >= needed
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    number = number_above + tl.sum((bits > low).to(tl.int32), 0)
    total = sum_above + tl.sum(tl.where(bits > low, weights, 0.0).to(tl.float64), 0)
    return low, number, total


@triton.jit
def ties_of_sum(needed, number_above, sum_above, threshold, lowest, ties):
    """How many weights equal to ``threshold`` top_p keeps; ``ties`` were left at ``lowest`` by top_k."""
    weight = threshold.to(tl.float32, bitcast=True).to(tl.float64)
    wanted = tl.ceil((needed - sum_above) / weight)
    wanted = tl.minimum(tl.maximum(wanted, (1 - number_above).to(tl.float64)), 2147483647.0).to(tl.int32)
    return tl.where(threshold > lowest, wanted, tl.minimum(ties, wanted))


@triton.jit
def commit(
    row, token, finite, tokens, is_valid, sampled_tokens, flags, words, addresses, ADJUSTS: tl.constexpr
):
    """Writes the result of a row where the host, the next step and later penalties look for it."""
    slot = tl.load(words + SLOT)
    if ADJUSTS:
        target = tl.load(words + TARGET)
        if target >= 0:
            token = target
        if ((flags & HAS_PENALTIES) != 0) & finite:
            counts = tl.load(addresses + COUNTS).to(tl.pointer_type(tl.int16))
            count = tl.load(counts + token).to(tl.int32)
            if (count & COUNT_BITS) < COUNT_BITS:
                tl.store(counts + token, (count + 1).to(tl.int16))
    tl.store(tokens + row, token)
    tl.store(is_valid + row, finite.to(tl.int32))
    if slot >= 0:
        tl.store(sampled_tokens + slot, token)


_TYPES = {
    **dict.fromkeys(("logits", "maxima", "sums", "raw_maxima", "raw_sums", "few_weights"), "*fp32:16"),
    **dict.fromkeys(("chosen_logits", "largest_logits", "totals", "top_logits"), "*fp32"),
    **dict.fromkeys(("subtiles", "few_ids"), "*i32:16"),
    **dict.fromkeys(("words", "tokens", "is_valid", "is_wide", "sampled_tokens", "ranks", "top_ids"), "*i32"),
    "numbers": "*fp64",
    "addresses": "*i64",
    "vocab_size": "i32",
}


def spec(function, name, num_warps, constexprs=None, vocab_size="i32"):
    """A compiled form of one of the kernels, whose arguments have the same types everywhere."""
    constexprs = constexprs or {}
    types = _TYPES | {"vocab_size": vocab_size}
    signature = {argument: types[argument] for argument in function.arg_names if argument not in constexprs}
    return KernelSpec(function, name, signature, constexprs, num_warps)


PATHS = {
    "greedy": {"DRAWN": False, "ADJUSTS": False},
    "drawn": {"DRAWN": True, "ADJUSTS": False},
    "full": {"DRAWN": True, "ADJUSTS": True},
}
"""The forms that ``SamplingPath`` chooses among."""

VOCAB_SIZES = {"": "i32:16", "_any": "i32"}
"""Rows of a multiple of 16 logits are read 16 bytes at a time."""
