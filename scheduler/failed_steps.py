"""What is done about steps that fail: they are tried again, smaller and smaller."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Several

from scheduler.sequence import Sequence

# Who has been in so many failed steps is given up, whoever is at fault.
_MAX_FAILURES = 32
# After the device had no memory left, one more sequence is admitted every so many steps.
_REGROW_EVERY = 64


class FailedSteps:
    """Sequences whose step failed, until they get a token or are given up.

    They are computed again from their tokens, in steps of half as many, apart from all others. So one that is
    at fault is alone after log2(n) failures; the others have gone on by then. One that fails again, alone, is
    given up. What the device had no memory for passes once the steps are small.

    Attributes:
        limits: of each sequence, with how many it may be in a step at most, itself included.
        max_running: sequences that may run at a time: less than the device can take after it had no memory.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self.max_running = max_num_seqs
        self._num_steps = 0
        self.limits: dict[Sequence, int] = {}

    def take(self, failed: Several[Sequence], *, had_no_memory: bool) -> list[Sequence]:
        """Takes the sequences of a failed step; returns those of them that are given up."""
        num = len(failed)
        if not num:
            return []
        if had_no_memory:
            self.max_running = max(1, min(self.max_running, num) // 2)
            self._num_steps = 0
        given_up = []
        for sequence in failed:
            sequence.num_failures += 1
            if sequence.num_failures > _MAX_FAILURES or (num == 1 and self.limits.get(sequence) == 1):
                given_up.append(sequence)
            else:
                self.limits[sequence] = max(1, num // 2)
        return given_up

    def allows(self, sequence: Sequence, others: Collection[Sequence], *, is_retry: bool) -> bool:
        """Whether a sequence may be in a step with ``others``, which is one of retries or of all the rest."""
        limit = self.limits.get(sequence)
        if limit is None or not is_retry:
            return limit is None and not is_retry
        return len(others) < min([limit, *(self.limits[other] for other in others)])

    def count_step(self) -> None:
        """A step has succeeded."""
        if self.max_running < self._max_num_seqs:
            self._num_steps += 1
            self.max_running += not self._num_steps % _REGROW_EVERY

    def check_invariants(self, sequences: Collection[Sequence]) -> None:
        """Raises AssertionError if a sequence is kept that has ended."""
        assert self.limits.keys() <= set(sequences), "a sequence that has ended is to be tried again"
        assert 1 <= self.max_running <= self._max_num_seqs
