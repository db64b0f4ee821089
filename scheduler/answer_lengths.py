"""How long answers get, as far as the last ones and those that still run tell."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable

from scheduler.sequence import Sequence

_NUM_LENGTHS = 64
# What counts as the last answers before any has ended: nobody knows of which order they are going to be.
# The shortest is the first to go: of answers that began together, those that end first are short.
_FIRST_LENGTHS = (32, 64, 128, 256, 512, 1024)
_ONE_GOES_AT = range(4, 4 * len(_FIRST_LENGTHS) + 1, 4)  # so many ended


class AnswerLengths:
    """The part of answers that get as long as some length: the estimate of Kaplan and Meier (1958).

    An answer that ``max_tokens`` has cut, or that still runs, says that it would be at least so long. Without
    these, answers would look too short: of those that began together the short ones end first. Answers that
    cannot end by themselves say nothing about those that can, and are left out.
    """

    def __init__(self) -> None:
        # (tokens, whether it was cut)
        self._last = deque(((length, False) for length in _FIRST_LENGTHS), maxlen=_NUM_LENGTHS)
        self._sorted = list(_FIRST_LENGTHS)
        self._num_ended = 0

    def ended(self, sequence: Sequence) -> None:
        """To be told of every sequence that ends. Whose client went away is one that ended by itself."""
        num_generated = len(sequence.token_ids) - sequence.num_prompt_tokens
        if num_generated and sequence.may_stop:
            self._num_ended += 1
            if self._num_ended in _ONE_GOES_AT:
                self._last.popleft()
            self._last.append((num_generated, len(sequence.token_ids) >= sequence.max_num_tokens))
            self._sorted = sorted(length for length, _ in self._last)

    @property
    def longest(self) -> int:
        """What an answer gets at most that is not longer than all others already, in tokens."""
        return _half_as_long_again(self._sorted[-1])

    def survival(self, running: Iterable[int], unit: int) -> list[float]:
        """The parts of answers that get at least 0, 1, 2 ... times ``unit`` tokens; the last of them is 0.

        Args:
            running: lengths of the answers that still run. For none of them the part is 0.
        """
        lengths, ages = self._sorted, sorted(running)
        num_ends = Counter(length for length, is_cut in self._last if not is_cut)
        ends = sorted(num_ends.items())
        longest = max([lengths[-1], *ages[-1:]])
        if longest not in num_ends or longest in ages[-1:]:  # somebody got longer than all that ended
            ends.append((_half_as_long_again(longest), 0))
        parts: list[float] = []
        part = 1.0
        for length, num_ended in ends:
            parts += [part] * (length // unit + 1 - len(parts))
            num_as_long = len(lengths) - bisect_left(lengths, length) + len(ages) - bisect_left(ages, length)
            part *= 1 - num_ended / max(num_as_long, 1)
        parts.append(0.0)
        return parts


def _half_as_long_again(length: int) -> int:
    """Beyond all others nothing is known, but that it got so far."""
    return length + length // 2 + 1
