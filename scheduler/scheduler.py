"""Decides what each step computes."""

from __future__ import annotations

import time
from collections import deque

from scheduler.admission import Admission
from scheduler.block_pool import BlockPool
from scheduler.executor import OutOfDeviceMemoryError
from scheduler.expected_blocks import ExpectedBlocks
from scheduler.failed_steps import FailedSteps
from scheduler.grammars import Grammars
from scheduler.messages import (
    EngineOutput,
    EngineStats,
    FinishReason,
    ModelRunnerOutput,
    NewSequence,
    Request,
    SampledToken,
    ScheduledSequence,
    SchedulerOutput,
)
from scheduler.scheduler_config import SchedulerConfig
from scheduler.sequence import Sequence
from scheduler.step import Step
from scheduler.waiting_queue import WaitingQueue

# Tokens that a step has for each sequence: whoever leaves, after a step for each token of its answer, makes
# place for a prompt that may be several times as long.
_TOKENS_OF_ONE = 16


class Scheduler:
    """Iteration-level scheduling over paged KV blocks.

    There is no prefill phase and no decode phase. A sequence has tokens, and a number of them are computed;
    each step hands out a budget of tokens so that the second number catches up with the first, and a
    sequence that has caught up gets one more token sampled. A prompt longer than the budget (chunked
    prefill), a prefix found in the cache (computed from the start), a preempted sequence (computed count back
    to 0) and a decode (one token behind) are all this one rule.

    A step may be scheduled before the results of the steps in flight are known. A sequence then counts the
    token about to be sampled, whose id only the executor knows, and goes on behind it.

    Why blocks can be released while steps in flight still write to them: the executor runs steps in order. A
    released block gets a new owner in a step issued later, whose writes come after those of the steps in
    flight, and the new owner reads no slot that it, or whoever indexed the block, did not write. Blocks are
    indexed when the step that completed them has succeeded, so no failed or unfinished step is ever shared,
    and no step in flight writes into an indexed block.
    """

    def __init__(self, config: SchedulerConfig, grammars: Grammars) -> None:
        self._config = config
        self._grammars = grammars
        self._pool = BlockPool(config.num_blocks, config.block_size, config.cache_seed)
        self._failed = FailedSteps(config.max_num_seqs)
        self._expected_blocks = ExpectedBlocks(self._pool)
        self._waiting = WaitingQueue()
        # In order of admission. A prompt that is cut leaves a token of the budget for each behind it.
        self._running: list[Sequence] = []
        self._admission = Admission(
            self._pool, self._waiting, self._running, self._expected_blocks, self._failed
        )
        self._sequences: dict[str, Sequence] = {}  # waiting and running
        self._in_flight: deque[list[Sequence]] = deque()
        self._released: list[str] = []  # to be told to the executor with the next step
        self._forced: dict[str, tuple[int, ...]] = {}  # the same, of running sequences
        self._outputs: list[EngineOutput] = []
        self._num_issued_steps = 0
        self._num_completed_steps = 0
        self._num_arrivals = 0
        self._num_cache_queries = 0
        self._num_cache_hits = 0
        self._num_preemptions = 0
        self._num_scheduled_tokens = 0
        self._num_recomputed_tokens = 0

    # ---- requests ----

    def add(self, request: Request) -> None:
        """Puts a request in the queue, once its grammar is ready; finishes it with ERROR if it can never run.

        Raises ValueError if a request of this id is not finished yet.
        """
        if request.request_id in self._sequences:
            raise ValueError(f"request {request.request_id!r} is running already")
        error = self._config.reason_to_refuse(request)
        if error is None and request.grammar is not None:
            self._grammars.prepare(request)
        else:
            self._enqueue(request, error)

    def _enqueue(self, request: Request, error: str | None) -> None:
        if error is not None:
            self._refuse(request.request_id, FinishReason.ERROR, error)
            return
        self._num_arrivals += 1
        sequence = Sequence(request, self._num_arrivals, self._config.max_num_tokens)
        self._sequences[request.request_id] = sequence
        self._waiting.add(sequence)

    def _refuse(self, request_id: str, reason: FinishReason, error: str | None = None) -> None:
        self._outputs.append(EngineOutput(request_id, finish_reason=reason, error=error))

    def abort(self, request_id: str) -> None:
        """Ends a request, wherever it is. Nothing happens if it is unknown or finished."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, FinishReason.ABORT)
        elif self._grammars.forget(request_id):
            self._refuse(request_id, FinishReason.ABORT)

    # ---- a step ----

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None if there is nothing to compute (before the steps in flight are done)."""
        for request, error in self._grammars.take_prepared():
            self._enqueue(request, error)
        is_retry = bool(self._failed.limits)
        step = Step(self._step_tokens(), self._config.attention_parity, is_retry=is_retry)
        self._fill(step)
        if step.is_retry and not step.shares:
            step.is_retry = False
            self._fill(step)
        if not step.shares:
            return None
        self._num_issued_steps += 1
        self._num_scheduled_tokens += step.num_tokens
        self._in_flight.append(list(step.shares))
        released, self._released = self._released, []
        forced, self._forced = self._forced, {}
        return SchedulerOutput(
            self._num_issued_steps,
            tuple(step.new),
            tuple(step.shares.values()),
            tuple(released),
            tuple(forced.items()),
            self._grammars.masks(step.shares.values()),
        )

    def _step_tokens(self) -> int:
        """Tokens of the next step at most. For few sequences, no more than the device is saturated by: more
        would only make all of them wait for the end of the step. Who is alone has nobody to wait for.
        """
        config = self._config
        num_sequences = len(self._sequences)
        if not config.saturating_num_tokens or num_sequences <= 1:
            return config.max_num_batched_tokens
        enough = max(config.saturating_num_tokens, num_sequences * _TOKENS_OF_ONE)
        return min(config.max_num_batched_tokens, enough)

    def _fill(self, step: Step) -> None:
        self._schedule_running(step)
        if not step.has_preempted:
            self._admit(step)
        self._extend_cut(step)

    def _schedule_running(self, step: Step) -> None:
        block_size, failed = self._config.block_size, self._failed.limits
        num_behind = len(self._running)
        for sequence in tuple(self._running):
            num_behind -= 1
            if not step.budget:
                return
            if not sequence.is_running:  # preempted a moment ago, for one before it
                continue
            if failed and not self._failed.allows(sequence, step.shares, is_retry=step.is_retry):
                continue
            if sequence.num_tokens == sequence.max_num_tokens:  # its last token is in flight
                continue
            if sequence.has_grammar and sequence.num_tokens > len(sequence.token_ids):
                continue  # what may come next depends on a token in flight
            num_tokens = sequence.num_tokens - sequence.num_computed_tokens
            if num_tokens > 1:
                num_tokens = step.chunk(sequence, num_tokens, sequence.num_computed_tokens, num_behind)
            end = sequence.num_computed_tokens + num_tokens
            new_block_ids: tuple[int, ...] = ()
            if end > len(sequence.block_ids) * block_size:
                new_block_ids = self._make_room(sequence, end, step)
                if not new_block_ids:
                    continue
            self._take(sequence, num_tokens, new_block_ids, step)

    def _extend_cut(self, step: Step) -> None:
        """Gives the sequence that was cut what nobody else has a use for."""
        sequence = step.cut
        if sequence is None or sequence not in step.shares:
            return
        share = step.shares[sequence]
        num_tokens = step.num_for_cut(share, sequence.num_tokens - share.start)
        if num_tokens == share.num_tokens:
            return
        num_blocks = self._pool.num_blocks_for(share.start + num_tokens) - len(sequence.block_ids)
        block_ids = self._pool.allocate(num_blocks)
        if block_ids is not None:
            sequence.block_ids += block_ids
            sequence.num_computed_tokens = share.start
            self._take(sequence, num_tokens, (*share.new_block_ids, *block_ids), step)

    def _make_room(self, sequence: Sequence, num_tokens: int, step: Step) -> tuple[int, ...]:
        """New blocks, so that the sequence has room for this many tokens; preempts the newest as needed.

        Empty if the sequence itself was the newest. The oldest is never preempted: it ends up alone, and then
        the pool is large enough for it (``max_num_tokens``). So some sequence always gets on.
        """
        num_blocks = self._pool.num_blocks_for(num_tokens) - len(sequence.block_ids)
        while (block_ids := self._pool.allocate(num_blocks)) is None:
            newest = max(self._running, key=lambda running: running.order)
            self._preempt(newest, step)
            if newest is sequence:
                return ()
        sequence.block_ids += block_ids
        return tuple(block_ids)

    def _take(self, sequence: Sequence, num_tokens: int, new_block_ids: tuple[int, ...], step: Step) -> None:
        start = sequence.num_computed_tokens
        end = start + num_tokens
        samples = end == sequence.num_tokens
        sequence.num_computed_tokens = end
        if samples:
            sequence.num_tokens = end + 1
        step.put(sequence, ScheduledSequence(sequence.request_id, start, num_tokens, new_block_ids, samples))

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        """Sends a running sequence back to the queue. What it has in flight still counts when it arrives."""
        share = step.take_back(sequence)
        if share is not None:
            sequence.num_tokens -= share.samples
        step.has_preempted = True
        self._num_preemptions += 1
        sequence.num_lost_tokens = sequence.num_computed_tokens if share is None else share.start
        sequence.resume_after_step = self._num_issued_steps
        self._leave_running(sequence)
        self._waiting.add(sequence)

    def _admit(self, step: Step) -> None:
        for entry in self._admission.entries(step, self._num_completed_steps):
            sequence, hits = entry.sequence, entry.hits
            num_hits = len(hits) * self._pool.block_size
            self._waiting.remove(sequence)
            self._running.append(sequence)
            sequence.is_running = True
            sequence.block_ids = hits + entry.block_ids
            sequence.num_indexed_blocks = len(hits)
            sequence.num_computed_tokens = num_hits
            self._expected_blocks.follow(sequence)
            self._num_recomputed_tokens += max(sequence.num_lost_tokens - num_hits, 0)
            sequence.num_lost_tokens = 0
            if not sequence.first_scheduled_time:
                self._note_first_admission(sequence, num_hits)
            step.new.append(
                NewSequence(
                    sequence.request_id,
                    tuple(sequence.token_ids),
                    sequence.num_prompt_tokens,
                    num_hits,
                    tuple(hits),
                    sequence.request.params,
                )
            )
            self._take(sequence, entry.num_tokens, tuple(entry.block_ids), step)

    def _note_first_admission(self, sequence: Sequence, num_hits: int) -> None:
        sequence.first_scheduled_time = time.monotonic()
        sequence.num_cached_tokens = num_hits
        if not sequence.request.params.reads_whole_prompt:
            self._num_cache_queries += sequence.num_tokens
            self._num_cache_hits += num_hits

    # ---- its result ----

    def update(self, step: SchedulerOutput, result: ModelRunnerOutput) -> None:
        """Takes the result of the oldest step in flight. One that does not answer the step fails it."""
        if result.step_id != step.step_id or [token.request_id for token in result.sampled] != [
            share.request_id for share in step.scheduled if share.samples
        ]:
            self.fail(step, RuntimeError(f"the result of step {result.step_id} does not answer it"))
            return
        self._failed.count_step()
        block_size = self._config.block_size
        prompt_logprobs = dict(result.prompt_logprobs)
        sampled = iter(result.sampled)
        for share, sequence in zip(step.scheduled, self._pop_in_flight(step), strict=True):
            token = next(sampled) if share.samples else None
            # Ended, or lost with another step, while this one was in flight: what it computed is dropped.
            if sequence.is_finished or step.step_id <= sequence.lost_until_step:
                continue
            num_full_blocks = (share.start + share.num_tokens) // block_size
            if num_full_blocks > sequence.num_indexed_blocks and sequence.is_running:
                self._index_blocks(sequence, num_full_blocks)
            if prompt_logprobs and share.request_id in prompt_logprobs:
                sequence.add_prompt_logprobs(share.start, prompt_logprobs[share.request_id])
            if token is not None:
                self._append(sequence, token)

    def fail(self, step: SchedulerOutput, error: Exception) -> None:
        """Sends the sequences of the oldest step in flight back, to be tried again (see ``FailedSteps``).

        Those that are given up end with ERROR. None of the step's blocks is indexed yet.
        """
        lost = [
            sequence
            for sequence in self._pop_in_flight(step)
            if not sequence.is_finished and step.step_id > sequence.lost_until_step
        ]
        given_up = self._failed.take(lost, had_no_memory=isinstance(error, OutOfDeviceMemoryError))
        for sequence in lost:
            if sequence in given_up:
                self._end(sequence, FinishReason.ERROR, f"{type(error).__name__}: {error}")
                continue
            sequence.lost_until_step = sequence.resume_after_step = self._num_issued_steps
            sequence.num_tokens = len(sequence.token_ids)
            if sequence.is_running:
                sequence.num_lost_tokens = sequence.num_computed_tokens
                self._leave_running(sequence)
                self._waiting.add(sequence)

    def take_outputs(self) -> tuple[EngineOutput, ...]:
        """What has happened to requests since the last call."""
        outputs, self._outputs = self._outputs, []
        return tuple(outputs)

    def _pop_in_flight(self, step: SchedulerOutput) -> list[Sequence]:
        self._num_completed_steps += 1
        if step.step_id != self._num_completed_steps:
            raise ValueError(
                f"step {step.step_id} is not the oldest in flight, {self._num_completed_steps} is"
            )
        return self._in_flight.popleft()

    def _index_blocks(self, sequence: Sequence, num_full_blocks: int) -> None:
        keys = sequence.block_keys
        for position in range(sequence.num_indexed_blocks, num_full_blocks):
            self._pool.extend_keys(keys, sequence.token_ids, sequence.request.cache_salt, position + 1)
            owner = sequence.request.cache_owner
            keys[position] = self._pool.cache(sequence.block_ids[position], keys[position], owner)
        sequence.num_indexed_blocks = num_full_blocks
        self._expected_blocks.follow(sequence)

    def _append(self, sequence: Sequence, token: SampledToken) -> None:
        if not token.is_valid:
            self._end(sequence, FinishReason.ERROR, "the logits were not finite numbers")
            return
        finish_reason = sequence.append(token.token_id)
        token_ids: tuple[int, ...] = (token.token_id,)
        if sequence.has_grammar:
            accepted = self._grammars.accept(sequence.request_id, token.token_id)
            if accepted.error is not None:
                self._end(sequence, FinishReason.ERROR, accepted.error)
                return
            forced, finish_reason = sequence.follow(accepted, finish_reason)
            if forced and sequence.is_running:
                self._forced[sequence.request_id] = forced
            token_ids += forced
        if self._failed.limits:
            self._failed.limits.pop(sequence, None)
        params = sequence.request.params
        is_first = len(sequence.token_ids) == sequence.num_prompt_tokens + len(token_ids)
        self._outputs.append(
            EngineOutput(
                sequence.request_id,
                token_ids,
                None if params.logprobs is None or token.logprobs is None else (token.logprobs,),
                tuple(sequence.prompt_logprobs) if is_first and params.prompt_logprobs is not None else None,
                finish_reason,
                sequence.num_cached_tokens,
                sequence.first_scheduled_time,
                embedding=token.embedding,
            )
        )
        if finish_reason is not None:
            self._leave(sequence)

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        self._outputs.append(
            EngineOutput(
                sequence.request_id,
                finish_reason=reason,
                num_cached_tokens=sequence.num_cached_tokens,
                first_scheduled_time=sequence.first_scheduled_time,
                error=error,
            )
        )
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        sequence.is_finished = True
        del self._sequences[sequence.request_id]
        self._failed.limits.pop(sequence, None)
        if sequence.has_grammar:
            self._grammars.forget(sequence.request_id)
        self._admission.ended(sequence)
        if sequence.is_running:
            self._leave_running(sequence)
        else:
            self._waiting.remove(sequence)

    def _leave_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._pool.release(sequence.block_ids)
        self._released.append(sequence.request_id)
        self._forced.pop(sequence.request_id, None)
        sequence.is_running = False
        sequence.block_ids = []
        sequence.num_computed_tokens = 0
        sequence.num_indexed_blocks = 0
        self._expected_blocks.follow(sequence)

    # ---- state ----

    def flush_prefix_cache(self) -> int:
        """Forgets the contents of all blocks; those of running sequences stay theirs. Returns how many."""
        return self._pool.flush()

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._in_flight or self._outputs or self._grammars.has_prepared)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_cache_usage=(self._pool.num_blocks - self._pool.num_free) / self._pool.num_blocks,
            prefix_cache_queries_total=self._num_cache_queries,
            prefix_cache_hits_total=self._num_cache_hits,
            preemptions_total=self._num_preemptions,
            steps_total=self._num_issued_steps,
            scheduled_tokens_total=self._num_scheduled_tokens,
            recomputed_tokens_total=self._num_recomputed_tokens,
        )

    def check_invariants(self) -> None:
        """Raises AssertionError if the state contradicts itself. Costs time proportional to all of it."""
        running, waiting = self._running, list(self._waiting)
        self._pool.check_invariants([sequence.block_ids for sequence in running])
        self._expected_blocks.check_invariants(self._sequences.values())
        assert len(running) <= self._config.max_num_seqs, "too many sequences run"
        assert {id(s) for s in running + waiting} == {id(s) for s in self._sequences.values()}, (
            "lost sequence"
        )
        self._failed.check_invariants(self._sequences.values())
        assert len(running) + len(waiting) == len(self._sequences), "a sequence is in two places"
        assert [s.order for s in waiting] == sorted(s.order for s in waiting), "the queue is out of order"
        assert len(self._in_flight) == self._num_issued_steps - self._num_completed_steps, "lost step"
        assert all(s.is_running for s in running), "who does not run is in the wrong place"
        assert not any(s.is_running for s in waiting), "who runs is in the wrong place"
        for sequence in self._sequences.values():
            sequence.check_invariants(self._config.block_size, len(self._in_flight))
