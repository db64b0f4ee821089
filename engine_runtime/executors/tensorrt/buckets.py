"""The token counts that segments are made for. A step is padded to the next one."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

_DECODE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_PREFILL = (16, 32, 64, 96, 128, 160, 192, *range(256, 4096, 128))  # most tiles have 128 rows


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


def saturating_tokens(hidden_size: int, num_multiprocessors: int) -> int:
    """Tokens from which the narrowest products of a layer have a tile of 128 tokens and 256 columns for each
    multiprocessor: larger steps compute no more tokens a second (Llama 3.1 8B on an H200)."""
    return num_multiprocessors // max(1, hidden_size // 256) * 128


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


class Buckets:
    """A row of buckets, of which some cannot be computed yet: the next larger one serves.

    One thread chooses, and one other may add what is missing.
    """

    def __init__(self, buckets: Sequence[int], missing: Iterable[int] = ()) -> None:
        """
        Args:
            buckets: rising; the last one is not missing.
        """
        self._all = tuple(buckets)
        self._missing = set(missing)
        self._needs: Counter[int] = Counter()
        if self._all[-1] in self._missing:
            raise ValueError(f"the largest bucket, {self._all[-1]}, must be there from the start")

    def choose(self, number: int) -> int:
        """The smallest bucket that holds ``number`` and can be computed.

        Raises:
            ValueError: none does.
        """
        bucket = bucket_for(self._all, number)
        if bucket not in self._missing:
            return bucket
        self._needs[bucket] += 1
        return next(other for other in self._all if other > bucket and other not in self._missing)

    @property
    def missing(self) -> list[tuple[int, int]]:
        """(how often it was asked for, bucket) of each that is missing."""
        return [(self._needs[bucket], bucket) for bucket in sorted(self._missing)]

    def add(self, bucket: int) -> None:
        """From now on it can be computed."""
        self._missing.discard(bucket)
