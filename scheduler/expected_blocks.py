"""Which blocks are being computed, so that whoever needs the same ones waits for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from scheduler.block_pool import BlockPool
from scheduler.sequence import Sequence


class ExpectedBlocks:
    """The next block that each running sequence completes, by its contents, if all of its tokens are known.

    Whoever has the same prefix hits all blocks before that one, so no later one need be known: its first
    miss is that block, until there is nothing left to wait for.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._digests: Counter[bytes] = Counter()

    def follow(self, sequence: Sequence) -> None:
        """To be told when a sequence has been admitted, has indexed blocks, or has lost its blocks."""
        if sequence.expected_key is not None:
            digest = sequence.expected_key.digest
            self._digests[digest] -= 1
            if not self._digests[digest]:
                del self._digests[digest]
            sequence.expected_key = None
        num_blocks = sequence.num_indexed_blocks + 1
        if sequence.is_running and num_blocks * self._pool.block_size <= len(sequence.token_ids):
            keys = sequence.block_keys
            self._pool.extend_keys(keys, sequence.token_ids, sequence.request.cache_salt, num_blocks)
            sequence.expected_key = keys[num_blocks - 1]
            self._digests[sequence.expected_key.digest] += 1

    def is_awaited(self, sequence: Sequence) -> bool:
        """Whether a sequence in the queue still waits for the block for which it waited at last."""
        return sequence.awaited_key is not None and sequence.awaited_key.digest in self._digests

    def is_next_of(self, sequence: Sequence, num_hits: int, max_hits: int) -> bool:
        """Whether the block behind the hits of a sequence, if it may be one, is going to be a hit too."""
        sequence.awaited_key = sequence.block_keys[num_hits] if num_hits < max_hits else None
        return self.is_awaited(sequence)

    def check_invariants(self, running: Iterable[Sequence]) -> None:
        """Raises AssertionError if a block is expected of nobody, or not expected of somebody."""
        keys = [sequence.expected_key for sequence in running if sequence.expected_key is not None]
        assert self._digests == Counter(key.digest for key in keys), "a block is expected of nobody"
