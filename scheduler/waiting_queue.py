"""The line in front of the running batch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from scheduler.sequence import Sequence

_ORDER = attrgetter("order")


class WaitingQueue:
    """Sequences that wait, by priority and then arrival.

    The order of a sequence never changes, so a preempted one comes back to its original place, in front of
    all that arrived after it. A sorted list: one insertion or removal moves 8 bytes an entry behind it.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __getitem__(self, position: int) -> Sequence:
        """The one behind ``position`` others. Raises IndexError if fewer wait."""
        return self._sequences[position]

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_ORDER)

    def remove(self, sequence: Sequence) -> None:
        """Raises ValueError if the sequence does not wait."""
        index = bisect_left(self._sequences, sequence.order, key=_ORDER)
        if index == len(self._sequences) or self._sequences[index] is not sequence:
            raise ValueError(f"sequence {sequence.request_id!r} does not wait")
        del self._sequences[index]
