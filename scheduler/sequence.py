"""The running state of one request."""

from __future__ import annotations

from scheduler.block_pool import BlockKey
from scheduler.messages import Accepted, FinishReason, Request, TokenLogprobs


class Sequence:
    """What the scheduler knows about a request between its arrival and its end.

        token_ids             |---- prompt ----|-- generated --|
        num_tokens            |--------------------------------|??|  ? = to be sampled by steps in flight
        num_computed_tokens   |----------------------|               keys and values exist after these steps
        block_ids             [    ][    ][    ][    ]               exactly enough for the computed tokens

    Attributes:
        order: (priority, arrival time, arrival number), never changed. The smallest is served first.
        max_num_tokens: the sequence ends with LENGTH when it has this many tokens.
        num_tokens: known tokens and those that steps in flight are going to sample.
        num_computed_tokens: tokens handed to the executor; counts a step as soon as it is scheduled.
        block_keys: keys of the leading full blocks, as far as they were needed.
        num_indexed_blocks: leading blocks that were offered to the prefix cache.
        expected_key: of the next block that it completes, if all of its tokens are known.
        awaited_key: of the block that somebody else was computing when it could have been admitted.
        num_cached_tokens: prefix-cache hits when the sequence was first admitted.
        prompt_logprobs: records for prompt tokens 1, 2, ... as far as they have arrived.
        resume_after_step: id of the last step issued before the sequence was preempted: until its result
            is known, tokens of the sequence may be missing, so it is not admitted again.
        lost_until_step: results of steps up to this one are dropped, since one of them failed.
        num_failures: failed steps that the sequence was in.
        num_lost_tokens: computed tokens of a sequence that was preempted, until it is admitted again.
        is_running: holds blocks, and the executor knows it.
        has_grammar: the next token may be sampled only when the last one is known.
        may_stop: it may end before it has ``max_num_tokens``, not counting that its client may go away.
    """

    __slots__ = (
        "awaited_key",
        "block_ids",
        "block_keys",
        "expected_key",
        "first_scheduled_time",
        "has_grammar",
        "is_finished",
        "is_running",
        "lost_until_step",
        "max_num_tokens",
        "may_stop",
        "min_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_failures",
        "num_indexed_blocks",
        "num_lost_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "order",
        "prompt_logprobs",
        "request",
        "request_id",
        "resume_after_step",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, request: Request, arrival_number: int, max_num_tokens: int) -> None:
        params = request.params
        self.request = request
        self.request_id = request.request_id
        self.order = (request.priority, request.arrival_time, arrival_number)
        self.token_ids = [*request.prompt_token_ids, *request.generated_token_ids]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.max_num_tokens = min(self.num_prompt_tokens + params.max_tokens, max_num_tokens)
        self.min_num_tokens = self.num_prompt_tokens + params.min_tokens
        self.stop_token_ids = frozenset(params.stop_token_ids)
        self.block_ids: list[int] = []
        self.block_keys: list[BlockKey] = []
        self.num_indexed_blocks = 0
        self.expected_key: BlockKey | None = None
        self.awaited_key: BlockKey | None = None
        self.num_cached_tokens = 0
        self.num_lost_tokens = 0
        self.lost_until_step = 0
        self.num_failures = 0
        self.first_scheduled_time = 0.0
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.resume_after_step = 0
        self.is_running = False
        self.is_finished = False
        self.has_grammar = request.grammar is not None
        self.may_stop = self.has_grammar or (
            bool(self.stop_token_ids) and self.min_num_tokens < self.max_num_tokens
        )

    def append(self, token_id: int) -> FinishReason | None:
        """Takes the token that a step sampled (``num_tokens`` counts it already); says if it is the last."""
        self.token_ids.append(token_id)
        num_tokens = len(self.token_ids)
        if token_id in self.stop_token_ids and num_tokens > self.min_num_tokens:
            return FinishReason.STOP
        if num_tokens >= self.max_num_tokens:
            return FinishReason.LENGTH
        return None

    def follow(
        self, accepted: Accepted, reason: FinishReason | None
    ) -> tuple[tuple[int, ...], FinishReason | None]:
        """Takes what a grammar forces behind the last token, of which ``append`` said ``reason``.

        Returns:
            The tokens taken, which no step has sampled, and whether the last of all is the last one.
        """
        forced = accepted.forced_token_ids
        num_taken = 0
        while reason is None and num_taken < len(forced):
            self.num_tokens += 1
            reason = self.append(forced[num_taken])
            num_taken += 1
        if accepted.has_ended and num_taken == len(forced):
            reason = FinishReason.STOP
        return forced[:num_taken], reason

    def add_prompt_logprobs(self, start: int, records: tuple[TokenLogprobs, ...]) -> None:
        """Takes the records of prompt tokens ``start + 1`` on; what a recomputation repeats is dropped."""
        self.prompt_logprobs.extend(records[len(self.prompt_logprobs) - start :])

    def check_invariants(self, block_size: int, num_in_flight: int) -> None:
        """Raises AssertionError if a sequence that has not ended contradicts itself."""
        assert not self.is_finished
        num_pending = self.num_tokens - len(self.token_ids)
        assert 0 <= num_pending <= num_in_flight, "tokens are expected from no step"
        assert self.num_computed_tokens < self.max_num_tokens, "the last token is computed"
        assert self.num_computed_tokens <= self.num_tokens
        assert len(self.block_ids) == -(-self.num_computed_tokens // block_size), (
            f"{self.request_id!r} has a wrong number of blocks"
        )
        for position, key in enumerate(self.block_keys):
            tokens = tuple(self.token_ids[position * block_size : (position + 1) * block_size])
            assert key.token_ids == tokens, f"{self.request_id!r} has a wrong key"
