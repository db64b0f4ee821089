"""``report``: how likely a token was, from the logits as they came."""

import triton
import triton.language as tl

from engine_runtime.kernels.triton.sampling_row import (
    FEW,
    FLAGS,
    HAS_LOGPROBS,
    INFINITY,
    LOG2_E,
    MAX_SUBTILES,
    MAX_TOP,
    NUM_WORDS,
    SUBTILE,
    TOP_N,
    first_place,
    is_finite,
    spec,
    weigh,
)


@triton.jit
def report(
    logits,
    words,
    raw_maxima,
    raw_sums,
    subtiles,
    tokens,
    is_valid,
    ranks,
    chosen_logits,
    largest_logits,
    totals,
    top_ids,
    top_logits,
    vocab_size,
):
    """Of the rows with logprobs: how likely the chosen token was, and the most likely ones.

    Grid: (rows,). The log-probability of a logit is logit - largest - log(total): ranks int32, chosen_logits,
    largest_logits, totals float32 [rows]. top_ids int32 and top_logits float32 [rows, 20]: the best TOP_N,
    equal ones by token id. A row whose logits were not finite as they came is not valid either.
    """
    row = tl.program_id(0)
    words += row * NUM_WORDS
    if (tl.load(words + FLAGS) & HAS_LOGPROBS) != 0:
        logits += row.to(tl.int64) * vocab_size
        subtiles += row * MAX_SUBTILES
        index = tl.arange(0, MAX_SUBTILES)
        exists = index < tl.cdiv(vocab_size, SUBTILE)
        live = tl.load(raw_maxima + row * MAX_SUBTILES + index, mask=exists, other=-INFINITY)
        sums = tl.load(raw_sums + row * MAX_SUBTILES + index, mask=exists, other=0.0)
        largest = tl.max(live, 0)
        if is_finite(largest) & (tl.load(is_valid + row) != 0):
            total = tl.sum(sums * weigh(live, largest, LOG2_E), 0)
            token = tl.minimum(tl.maximum(tl.load(tokens + row), 0), vocab_size - 1)
            logit = tl.load(logits + token)

            qualifies = live > logit
            tl.store(subtiles + tl.cumsum(qualifies.to(tl.int32), 0) - 1, index, mask=qualifies)
            num_qualified = tl.sum(qualifies.to(tl.int32), 0)
            tl.debug_barrier()
            entry = tl.arange(0, FEW)
            greater = tl.zeros([FEW], tl.int32)
            for first in range(0, num_qualified, FEW // SUBTILE):
                position = first + entry // SUBTILE
                inside = position < num_qualified
                ids = tl.load(subtiles + position, mask=inside, other=0) * SUBTILE + entry % SUBTILE
                x = tl.load(logits + ids, mask=inside & (ids < vocab_size), other=-INFINITY)
                greater += (x > logit).to(tl.int32)
            tl.store(ranks + row, 1 + tl.sum(greater, 0))
            tl.store(chosen_logits + row, logit)
            tl.store(largest_logits + row, largest)
            tl.store(totals + row, total)

            left = tl.where(exists, tl.minimum(vocab_size - index * SUBTILE, SUBTILE), 0)
            lane = tl.arange(0, SUBTILE)
            last_id = row * 0 - 1
            last_logit = largest
            for n in range(tl.load(words + TOP_N)):
                live = tl.where(left > 0, live, -INFINITY)
                best = tl.max(live, 0)
                subtile = first_place((live == best) & (left > 0), index, MAX_SUBTILES)
                ids = subtile * SUBTILE + lane
                x = tl.load(logits + ids, mask=ids < vocab_size, other=-INFINITY)
                is_left = (ids < vocab_size) & ((x < last_logit) | ((x == last_logit) & (ids > last_id)))
                chosen = first_place(is_left & (x == best), ids, 2147483647)
                tl.store(top_ids + row * MAX_TOP + n, chosen)
                tl.store(top_logits + row * MAX_TOP + n, best)
                next_best = tl.max(tl.where(is_left & (ids != chosen), x, -INFINITY), 0)
                here = index == subtile
                live = tl.where(here, next_best, live)
                left = tl.where(here, left - 1, left)
                last_id = chosen
                last_logit = best
        else:
            tl.store(is_valid + row, 0)


SPECS = [spec(report, "sample_report", 8)]
