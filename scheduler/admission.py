"""Who of those who wait gets into a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from scheduler.block_pool import BlockPool
from scheduler.expected_blocks import ExpectedBlocks
from scheduler.failed_steps import FailedSteps
from scheduler.growth_forecast import GrowthForecast
from scheduler.sequence import Sequence
from scheduler.step import Step
from scheduler.waiting_queue import WaitingQueue

# So many of the queue are passed over, behind a prompt that is cut, by who fits beside it.
_MAX_PASSED = 16


class Entry(NamedTuple):
    """One that gets in: with cached blocks, and new ones for as many tokens behind them."""

    sequence: Sequence
    hits: list[int]
    num_tokens: int
    block_ids: list[int]


class Admission:
    """Goes through the queue in order, but for those whose prefix somebody else is computing: it is computed
    once. Behind a prompt that is cut only those get in whose tokens all fit.

    A sequence gets in only if all its tokens would fit, with one block to spare for each running sequence, or
    as many as they are expected to need: it would be the first to be preempted when one of them grows, and
    its work lost.

    Args:
        waiting, running: those of the scheduler, which moves whoever gets in from one to the other.
    """

    def __init__(
        self,
        pool: BlockPool,
        waiting: WaitingQueue,
        running: list[Sequence],
        expected_blocks: ExpectedBlocks,
        failed: FailedSteps,
    ) -> None:
        self._pool = pool
        self._waiting = waiting
        self._running = running
        self._expected_blocks = expected_blocks
        self._failed = failed
        self._forecast = GrowthForecast(pool.block_size)

    def ended(self, sequence: Sequence) -> None:
        """To be told of every sequence that ends, however it does."""
        self._forecast.ended(sequence)

    def entries(self, step: Step, num_completed_steps: int) -> Iterator[Entry]:
        """Each that gets into the step. It must run, and be in the step, before the next is asked for."""
        pool, waiting, running, expected = self._pool, self._waiting, self._running, self._expected_blocks
        failed = self._failed
        position = num_passed = 0
        while step.budget and position < len(waiting) and len(running) < failed.max_running:
            sequence = waiting[position]
            if expected.is_awaited(sequence):
                position += 1
                continue
            if failed.limits and not failed.allows(sequence, step.shares, is_retry=step.is_retry):
                return
            if sequence.resume_after_step > num_completed_steps or pool.num_free <= len(running):
                return
            max_hits = self._max_hits(sequence)
            hits = self._match_prefix(sequence, max_hits)
            if expected.is_next_of(sequence, len(hits), max_hits):
                position += 1
                continue
            num_hits = len(hits) * pool.block_size
            num_tokens = sequence.num_tokens - num_hits
            if step.cut is None:
                num_tokens = step.chunk(sequence, num_tokens, num_hits)
            elif not step.fits(num_tokens, num_hits):
                num_passed += 1
                if num_passed == _MAX_PASSED:
                    return
                position += 1
                continue
            block_ids = self._allocate(sequence, hits, num_hits + num_tokens)
            if block_ids is None:
                return
            step.is_shared = step.cut not in (None, sequence)
            yield Entry(sequence, hits, num_tokens, block_ids)

    def _max_hits(self, sequence: Sequence) -> int:
        """Cached blocks at most. Never all tokens: the last is computed, to sample from it."""
        if sequence.request.params.reads_whole_prompt:
            return 0
        return (sequence.num_tokens - 1) // self._pool.block_size

    def _match_prefix(self, sequence: Sequence, max_hits: int) -> list[int]:
        """Cached blocks to start from."""
        return self._pool.match_prefix(
            sequence.block_keys, sequence.token_ids, sequence.request.cache_salt, max_hits
        )

    def _allocate(self, sequence: Sequence, hits: list[int], end: int) -> list[int] | None:
        """New blocks up to token ``end``, and references to the hits; None if there is no room for it."""
        pool, running = self._pool, self._running
        num_blocks = pool.num_blocks_for(end) - len(hits)
        num_later_blocks = pool.num_blocks_for(sequence.num_tokens) - len(hits) - num_blocks
        num_spare = num_later_blocks + len(running)
        # Who is alone is let in, whatever is expected of it: it must get on.
        if running:
            everybody = (*running, sequence)
            num_own = num_blocks + num_later_blocks
            if self._forecast.is_needed(everybody, pool.num_free - num_own):
                growth = self._forecast.peak(everybody, num_own)
                num_spare = max(num_spare, num_later_blocks + growth)
        return pool.allocate(num_blocks, hits, num_spare)
