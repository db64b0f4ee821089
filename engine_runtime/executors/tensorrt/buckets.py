"""The token counts that segments are made for. A step is padded to the next one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_DECODE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_PREFILL = (16, 32, 64, 96, 128, 192, *range(256, 4096, 128))  # tiles have 128 rows at most


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Of steps in which all sequences have one token, and of rows of logits; ends with ``max_num_seqs``."""
    return _up_to(max_num_seqs, _DECODE, 64)


def token_buckets(max_num_batched_tokens: int) -> tuple[int, ...]:
    """Of all other steps; ends with ``max_num_batched_tokens``. From 96 on, at most a third is padding;
    from 512 on, a quarter."""
    return _up_to(max_num_batched_tokens, (*_PREFILL, 4096), 256)


def largest_step(max_num_batched_tokens: int, max_rows: int) -> int:
    """Tokens of the largest bucket: steps of rows may be padded beyond ``max_num_batched_tokens``."""
    return max(max_num_batched_tokens, max_rows)


def bucket_for(buckets: Sequence[int], number: int) -> int:
    """The smallest bucket that holds ``number``.

    Raises:
        ValueError: none does.
    """
    index = bisect_left(buckets, number)
    if index == len(buckets):
        raise ValueError(f"{number} is more than the largest bucket, {buckets[-1]}")
    return buckets[index]


def _up_to(largest: int, first: Sequence[int], step: int) -> tuple[int, ...]:
    """``first`` and more, ``step`` apart, which doubles every four; those below ``largest``, then that."""
    buckets = list(first)
    while buckets[-1] < largest:
        buckets += [buckets[-1] + step * (i + 1) for i in range(4)]
        step *= 2
    return (*(bucket for bucket in buckets if bucket < largest), largest)
