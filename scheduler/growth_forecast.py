"""How much memory those who run are going to need before some of them end."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable

from scheduler.sequence import Sequence

_NUM_LENGTHS = 64
_FIRST_LENGTH = 128  # what is expected of answers before any has ended, in tokens
_QUANTILE = 0.75  # of the answers that got as long as this one is: three of four ended before


class GrowthForecast:
    """Expects of an answer what became of earlier ones that got as long, or all that it may have.

    All that run grow by a token a step. The blocks that they need on top are most just before one of them
    ends, for what it held is free then. So the peak is found by going through their ends, the last one first:

        blocks   ______/|
               _/       |__/|        one ends at each |, and gives back what it held
              /             |___
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._last = deque([_FIRST_LENGTH], maxlen=_NUM_LENGTHS)
        self._sorted = [_FIRST_LENGTH]

    def ended(self, sequence: Sequence) -> None:
        num_generated = len(sequence.token_ids) - sequence.num_prompt_tokens
        if num_generated:
            self._last.append(num_generated)
            self._sorted = sorted(self._last)

    def is_needed(self, num_free: int, num_running: int) -> bool:
        """Whether so many free blocks may be too few for so many that run and one more."""
        return num_free < (num_running + 1) * (self._sorted[-1] // self._block_size + 2)

    def _expected(self, num_generated: int) -> int:
        """Tokens that an answer will still get that has so many."""
        lengths = self._sorted
        first = bisect_right(lengths, num_generated)
        if first == len(lengths):
            return self._block_size
        return lengths[first + int(_QUANTILE * (len(lengths) - first))] - num_generated

    def peak(self, sequences: Iterable[Sequence], num_new_blocks: int) -> int:
        """Blocks that ``sequences`` will need at most on top of those that they hold.

        Args:
            num_new_blocks: that the last of them, which runs not yet, gets for the tokens that it has.
        """
        block_size = self._block_size
        # (steps to its end, blocks until then for tokens it has, blocks that are free after it)
        lives: list[tuple[int, int, int]] = []
        num_held = 0
        for sequence in sequences:
            num_tokens = len(sequence.token_ids)
            steps = self._expected(num_tokens - sequence.num_prompt_tokens)
            steps = min(steps, sequence.max_num_tokens - num_tokens)
            if sequence.is_running:
                num_blocks = -(-num_tokens // block_size) - len(sequence.block_ids)
                num_own = len(sequence.block_ids) - sequence.num_cached_tokens // block_size
            else:
                num_blocks, num_own = 0, num_new_blocks
            lives.append((steps, num_blocks, num_own))
            num_held += num_own
        lives.sort(reverse=True)
        most = num_blocks_so_far = num_held_so_far = 0
        for count, (steps, num_blocks, num_own) in enumerate(lives, 1):
            num_blocks_so_far += num_blocks
            num_held_so_far += num_own
            growth = num_blocks_so_far + count * -(-steps // block_size) - (num_held - num_held_so_far)
            most = max(most, growth)
        return most
