"""How long a compiled matrix product takes, roughly: enough to choose a form without timing any.

A form's tiles are spread over the multiprocessors; a tile takes as long as the slowest of its arithmetic, of
what it reads from the second-level cache, and of what comes from memory for the first time. The whole takes
no less than reading all weights.

The constants are fitted to 3,013 times on one H200, of all projections but the output ("Sizes that nobody has
timed" in ``tests/benchmarks/results/gpu_segments.md``). On another GPU they are off, more or less alike for
all forms, and what counts is the order.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine_runtime.executors.tensorrt.gemm_form import GemmForm

# In a microsecond, of a multiprocessor: operations with 16 bits, bytes from the second-level cache and from
# memory. Of the whole device: bytes of weights, and of partial sums that are written and read again.
_HOPPER_OPERATIONS, _OTHER_OPERATIONS = 4.6e6, 3.8e6
_CACHED_BYTES = 102e3
_FRESH_BYTES = 61e3
_WEIGHT_BYTES = 4.0e6
_SUM_BYTES = 3.3e6
_TILE = 0.06  # microseconds between two tiles
_LATE = 2.3  # microseconds until a form has its first weights; "thin" has them when its turn comes
_SHARED_MEMORY = 227 << 10
_THREADS = 2048
MOST_TIMED = 7
"""So many of the best predicted are worth timing: the fastest of them takes 0.02 % more than the fastest of
all on average, 1.6 % at most."""


def best_first(
    forms: Iterable[GemmForm], n: int, k: int, num_tokens: int, num_multiprocessors: int
) -> list[GemmForm]:
    """Ordered by what is predicted; where that is the same, those first that read more of W at a time."""

    def cost(form: GemmForm) -> tuple[float, int, str]:
        time = predicted_microseconds(form, n, k, num_tokens, num_multiprocessors)
        return time, -form.rows * form.bk, form.name

    return sorted(forms, key=cost)


def predicted_microseconds(
    form: GemmForm, n: int, k: int, num_tokens: int, num_multiprocessors: int
) -> float:
    """Of y [num_tokens, n] = f(x W^T) with k columns of x, by any form but "gemv"."""
    bytes_each = 1 if form.is_fp8 else 2
    rows_each = form.rows // form.columns  # of W for a column of the result
    token_tiles = -(-num_tokens // form.bm)
    num_tiles = token_tiles * -(-n // form.columns) * form.num_parts
    num_steps = k // (form.bk * form.num_parts)
    operations = 2 * form.bm * form.rows * form.bk / (2 if form.is_fp8 else 1)
    fresh = form.rows * form.bk * bytes_each
    cached = fresh + min(form.bm, num_tokens) * form.bk * bytes_each
    step = max(
        operations / (_HOPPER_OPERATIONS if form.function == "hopper" else _OTHER_OPERATIONS),
        cached / _CACHED_BYTES,
        fresh / token_tiles / _FRESH_BYTES,
    )
    together = _programs_together(form, bytes_each)
    num_rounds, rest = divmod(num_tiles, num_multiprocessors * together)
    num_turns = num_rounds * together + -(-rest // num_multiprocessors)
    weights = n * rows_each * k * bytes_each
    microseconds = max(num_turns * (num_steps * step + _TILE), weights / _WEIGHT_BYTES)
    if form.function != "thin":
        microseconds += _LATE
    if form.num_parts > 1:
        microseconds += 2 * num_tokens * n * form.result_bytes / _SUM_BYTES
    return microseconds


def _programs_together(form: GemmForm, bytes_each: int) -> int:
    """How many share a multiprocessor."""
    if form.is_persistent:
        return 1
    shared_memory = (form.bm + form.rows) * form.bk * bytes_each * form.num_stages
    return max(1, min(_SHARED_MEMORY // shared_memory, _THREADS // (32 * form.num_warps)))
