"""A step while it is put together: who gets how much of it."""

from __future__ import annotations

from scheduler.messages import NewSequence, ScheduledSequence
from scheduler.sequence import Sequence

# The part of a step that a prompt takes which is cut, if others that wait behind it fit into the rest.
_CUT_SHARE = 4


class Step:
    """Hands out a budget of work. Its unit is a token that attends to nothing before it.

    A prompt whose tokens do not all fit is cut, one in each step. At first it gets a quarter of what is left,
    so that shorter ones behind it get on, and the step is short for them; what then nobody has a use for is
    its own.

    Attributes:
        budget: what may still be handed out.
        shares: who gets what, in order.
        new: what the executor is to be told of those who were admitted.
        is_retry: of sequences of steps that failed.
        has_preempted: somebody lost its blocks for another.
        cut: whose tokens did not all fit.
        is_shared: somebody was admitted behind it.
    """

    __slots__ = (
        "_attention_parity",
        "budget",
        "cut",
        "has_preempted",
        "is_retry",
        "is_shared",
        "new",
        "shares",
    )

    def __init__(self, max_num_tokens: int, attention_parity: int, *, is_retry: bool) -> None:
        """
        Args:
            attention_parity: as in ``ExecutorSpec``.
        """
        self._attention_parity = attention_parity
        self.budget = max_num_tokens
        self.shares: dict[Sequence, ScheduledSequence] = {}
        self.new: list[NewSequence] = []
        self.is_retry = is_retry
        self.has_preempted = False
        self.cut: Sequence | None = None
        self.is_shared = False

    @property
    def num_tokens(self) -> int:
        return sum(share.num_tokens for share in self.shares.values())

    def fits(self, num_tokens: int, start: int) -> bool:
        """Whether there is room for tokens that come behind ``start`` others."""
        return self._cost(num_tokens, start) <= self.budget

    def chunk(self, sequence: Sequence, num_tokens: int, start: int, num_behind: int = 0) -> int:
        """How many of its tokens behind ``start`` a sequence gets for now; at least one, of a budget above 0.

        Args:
            num_behind: sequences that run and have their turn later: each is left a token.
        """
        budget = self.budget - num_behind
        if self._cost(num_tokens, start) <= budget:
            return num_tokens
        if self.cut is None:
            self.cut = sequence
            budget = min(budget, self.budget // _CUT_SHARE)
        return max(1, min(num_tokens, self._num_fitting(budget, start)))

    def num_for_cut(self, share: ScheduledSequence, num_tokens: int) -> int:
        """How many of ``num_tokens`` the sequence that was cut may have, once all others have theirs."""
        if self.is_shared:
            return share.num_tokens
        budget = self.budget + self._cost(share.num_tokens, share.start)
        return max(share.num_tokens, min(num_tokens, self._num_fitting(budget, share.start)))

    def put(self, sequence: Sequence, share: ScheduledSequence) -> None:
        """Gives a sequence its share, or another one in the same place."""
        before = self.shares.get(sequence)
        if before is not None:
            self.budget += self._cost(before.num_tokens, before.start)
        self.shares[sequence] = share
        self.budget -= self._cost(share.num_tokens, share.start)

    def take_back(self, sequence: Sequence) -> ScheduledSequence | None:
        share = self.shares.pop(sequence, None)
        if share is not None:
            self.budget += self._cost(share.num_tokens, share.start)
        return share

    def _cost(self, num_tokens: int, start: int) -> int:
        parity = self._attention_parity
        if num_tokens == 1 or not parity:
            return num_tokens
        return -(-num_tokens * (parity + start) // parity)

    def _num_fitting(self, budget: int, start: int) -> int:
        parity = self._attention_parity
        return budget * parity // (parity + start) if parity else budget
