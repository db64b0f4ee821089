"""How much memory those who run are going to need before some of them end."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, sqrt

from scheduler.answer_lengths import AnswerLengths
from scheduler.sequence import Sequence

_NUM_TIMES = 64  # at most, at which the need is worked out
_CAUTION = 2.5  # standard deviations; with 2 a preemption is three times as frequent
_LAST_BLOCK_VARIANCE = 1 / 12  # of its filling: anything between empty and full is as likely


class GrowthForecast:
    """Adds up, for the times to come, what those are going to hold who are still there.

    All that run grow by a token a step; one that ends gives back what it held. Who cannot end by itself is
    there until it has ``max_num_tokens``. Of the others each is there with the probability that an answer as
    long as its own gets so much longer. The need is a sum of many, so its mean and variance say it all:

        blocks        ______
                  ___/      \\___      mean and caution: its peak counts
              ___/   ____       \\___
             /  ____/    \\____       mean
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._lengths = AnswerLengths()

    def ended(self, sequence: Sequence) -> None:
        """To be told of every sequence that ends, however it does."""
        self._lengths.ended(sequence)

    def is_needed(self, sequences: Iterable[Sequence], num_free: int) -> bool:
        """Whether so many free blocks may be too few for all that these sequences may still get."""
        longest, block_size = self._lengths.longest, self._block_size
        num_blocks = 0
        for sequence in sequences:
            num_left = sequence.max_num_tokens - len(sequence.token_ids)
            if num_left > longest and sequence.may_stop:
                num_left = longest
            num_blocks += num_left // block_size + 2
        return num_blocks > num_free

    def peak(self, sequences: Iterable[Sequence], num_new_blocks: int) -> int:
        """Blocks that ``sequences`` will need at most on top of those that they hold.

        Args:
            num_new_blocks: that the last of them, which runs not yet, gets for the tokens that it has.
        """
        block_size = self._block_size
        sequences = tuple(sequences)
        ages = [len(s.token_ids) - s.num_prompt_tokens for s in sequences if s.may_stop]
        unit = self._unit(sequences, ages)
        survival = self._lengths.survival(ages, unit)
        # By (age, time left) in units: how many, their blocks, the squares of these. Age -1: cannot stop.
        groups: dict[tuple[int, int], tuple[int, float, float]] = {}
        num_held = 0
        for sequence in sequences:
            num_tokens = len(sequence.token_ids)
            if sequence.is_running:
                num_shared = sequence.num_cached_tokens // block_size
                num_held += len(sequence.block_ids) - num_shared
                num_blocks = num_tokens / block_size + 0.5 - num_shared
            else:
                num_held += num_new_blocks
                num_blocks = num_new_blocks
            age, left = -1, -((num_tokens - sequence.max_num_tokens) // unit)
            if sequence.may_stop:
                age = (num_tokens - sequence.num_prompt_tokens) // unit
                left = min(left, len(survival) - age - 2)
            count, blocks, squares = groups.get((age, left), (0, 0.0, 0.0))
            groups[age, left] = count + 1, blocks + num_blocks, squares + num_blocks * num_blocks
        num_times = 1 + max(left for _, left in groups)
        means, variances = [0.0] * num_times, [0.0] * num_times
        for (age, left), (count, blocks, squares) in groups.items():
            for time in range(left + 1):
                part = survival[age + time] / survival[age] if age >= 0 else 1.0
                growth = time * unit // block_size
                total = blocks + count * growth
                means[time] += part * total
                spread = squares + growth * (blocks + total)
                variances[time] += part * ((1 - part) * spread + count * _LAST_BLOCK_VARIANCE)
        most = max(mean + _CAUTION * sqrt(var) for mean, var in zip(means, variances, strict=True))
        return max(0, ceil(most) - num_held)

    def _unit(self, sequences: tuple[Sequence, ...], ages: list[int]) -> int:
        """Tokens between two times: whole blocks, and few times until the last of them may end."""
        lefts = [s.max_num_tokens - len(s.token_ids) for s in sequences if not s.may_stop]
        if ages:
            lefts.append(max(self._lengths.longest, *ages))
        return self._block_size * -(-max(lefts) // (self._block_size * _NUM_TIMES))
