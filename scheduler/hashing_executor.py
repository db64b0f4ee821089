"""An executor without a model: shows mistakes in scheduling and block handling that a model would blur."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from scheduler.executor import ExecutorLostError
from scheduler.messages import (
    ExecutorSpec,
    FinishReason,
    ModelRunnerOutput,
    Request,
    SampledToken,
    SamplingParams,
    ScheduledSequence,
    SchedulerOutput,
    TokenLogprobs,
    TokenMasks,
)

_MASK = (1 << 64) - 1
EMPTY_PREFIX = 0x9E3779B97F4A7C15
_POISON = -1


class SchedulingError(ExecutorLostError):
    """The scheduler asked for something that gives, or may give, wrong tokens: no step is tried again."""


def extend_hash(prefix_hash: int, token_id: int) -> int:
    """64-bit hash of a prefix with one more token."""
    mixed = ((prefix_hash ^ token_id) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def sample(prefix_hash: int, params: SamplingParams, num_generated: int, vocab_size: int) -> int:
    """The token after a prefix. Depends on the seed too, and on stop tokens while ``min_tokens`` masks."""
    token_id = extend_hash(prefix_hash, params.seed) % vocab_size
    if num_generated < params.min_tokens and len(set(params.stop_token_ids)) < vocab_size:
        while token_id in params.stop_token_ids:
            token_id = (token_id + 1) % vocab_size
    return token_id


def sample_allowed(prefix_hash: int, params: SamplingParams, allowed: Sequence[int]) -> int:
    """The token after a prefix, out of those that a grammar allows."""
    return allowed[extend_hash(prefix_hash, params.seed) % len(allowed)]


def describe(prefix_hash: int, token_id: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    """Invented but reproducible log probabilities of a token after a prefix."""
    logprob = -(prefix_hash % 1000) / 100
    top = tuple(((token_id + rank) % vocab_size, logprob - rank) for rank in range(min(num_top, vocab_size)))
    return TokenLogprobs(token_id, logprob, 1, top)


def run_alone(request: Request, spec: ExecutorSpec) -> tuple[list[int], FinishReason]:
    """What a request must generate, worked out without blocks, steps or a scheduler."""
    params, prefix_hash = request.params, EMPTY_PREFIX
    for token_id in request.prompt_token_ids:
        prefix_hash = extend_hash(prefix_hash, token_id)
    max_tokens = min(
        params.max_tokens,
        spec.max_model_len - len(request.prompt_token_ids),
        spec.num_blocks * spec.block_size + 1 - len(request.prompt_token_ids),
    )
    generated: list[int] = []
    while len(generated) < max_tokens:
        generated.append(sample(prefix_hash, params, len(generated), spec.vocab_size))
        prefix_hash = extend_hash(prefix_hash, generated[-1])
        if generated[-1] in params.stop_token_ids and len(generated) > params.min_tokens:
            return generated, FinishReason.STOP
    return generated, FinishReason.LENGTH


@dataclass(slots=True)
class _State:
    """What the executor keeps of one sequence. ``is_broken``: it was in a step that failed."""

    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: list[int]
    params: SamplingParams
    is_broken: bool = False


class HashingExecutor:
    """Stores in each KV slot a hash of the whole prefix up to it, and samples from what it reads back.

    Each step reads every slot of every scheduled sequence through its block table, before anything is
    written and again after everything is. A block that is missing, shared too early, overwritten or in the
    wrong place raises SchedulingError, which fails the step; so does a step that exceeds the spec or
    contradicts the steps before it.

    With ``max_in_flight`` above 1 the steps run in a thread, in order, and the futures are deferred ones.

    Args:
        num_blocks, block_size, vocab_size, max_num_seqs, max_num_batched_tokens, max_model_len,
        attention_parity, saturating_num_tokens: as in ``ExecutorSpec``. With a vocabulary of 2 and small
            blocks, prefixes of requests coincide.
        step_seconds: how long a step takes at least.
        fail_at_steps: ids of steps that raise RuntimeError after destroying the slots they were to write.
            They have forgotten ``released`` and learned ``new`` all the same, as those of any executor must.
        invalid_at_steps: ids of steps whose first sampled token is not valid.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        vocab_size: int = 2,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 1024,
        max_in_flight: int = 1,
        attention_parity: int = 0,
        saturating_num_tokens: int = 0,
        step_seconds: float = 0.0,
        fail_at_steps: Collection[int] = (),
        invalid_at_steps: Collection[int] = (),
    ) -> None:
        self._spec = ExecutorSpec(
            model_id="hashing",
            vocab_size=vocab_size,
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            device="none (hashes)",
            attention_parity=attention_parity,
            saturating_num_tokens=saturating_num_tokens,
        )
        self._max_in_flight = max_in_flight
        self._step_seconds = step_seconds
        self._fail_at_steps = frozenset(fail_at_steps)
        self._invalid_at_steps = frozenset(invalid_at_steps)
        self._slots = [_POISON] * (num_blocks * block_size)
        self._states: dict[str, _State] = {}
        self._thread = ThreadPoolExecutor(max_workers=1) if max_in_flight > 1 else None

    @property
    def spec(self) -> ExecutorSpec:
        return self._spec

    @property
    def max_in_flight(self) -> int:
        return self._max_in_flight

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        if self._thread is not None:
            return self._thread.submit(self._run, step)
        future: Future[ModelRunnerOutput] = Future()
        try:
            future.set_result(self._run(step))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def _run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        if self._step_seconds:
            time.sleep(self._step_seconds)
        self._learn(step)
        states = [self._states[share.request_id] for share in step.scheduled]
        if step.step_id in self._fail_at_steps:
            self._destroy(states, step)
            raise RuntimeError(f"step {step.step_id} was told to fail")
        work = [
            (share, state) for share, state in zip(step.scheduled, states, strict=True) if not state.is_broken
        ]
        for share, state in work:
            self._check_share(share, state)
            self._read(state, share.start)
        for share, state in work:
            self._write(state, share)
        for share, state in work:
            self._read(state, share.start + share.num_tokens)
        return ModelRunnerOutput(
            step.step_id,
            self._sample(step, states),
            tuple(
                (share.request_id, self._describe_prompt(state, share))
                for share, state in work
                if state.params.prompt_logprobs is not None and share.start < state.num_prompt_tokens - 1
            ),
        )

    def _learn(self, step: SchedulerOutput) -> None:
        for request_id in step.released:
            if self._states.pop(request_id, None) is None:
                raise SchedulingError(f"{request_id!r} is released but not known")
        for new in step.new:
            if new.request_id in self._states:
                raise SchedulingError(f"{new.request_id!r} is new but known")
            if new.num_computed_tokens != len(new.block_ids) * self._spec.block_size:
                raise SchedulingError(f"{new.request_id!r} starts with blocks that are not full")
            if new.num_computed_tokens and new.params.prompt_logprobs is not None:
                raise SchedulingError(
                    f"{new.request_id!r} wants prompt_logprobs of tokens that are not computed"
                )
            self._states[new.request_id] = _State(
                list(new.token_ids),
                new.num_prompt_tokens,
                new.num_computed_tokens,
                list(new.block_ids),
                new.params,
            )
        for request_id, token_ids in step.forced:
            if request_id not in self._states:
                raise SchedulingError(f"{request_id!r} is told of tokens but not known")
            self._states[request_id].token_ids += token_ids
        for share in step.scheduled:
            self._states[share.request_id].block_ids += share.new_block_ids
        if len(self._states) > self._spec.max_num_seqs:
            raise SchedulingError(f"{len(self._states)} sequences are alive")
        if not 0 < step.num_tokens <= self._spec.max_num_batched_tokens:
            raise SchedulingError(f"{step.num_tokens} tokens in one step")

    def _check_share(self, share: ScheduledSequence, state: _State) -> None:
        end = share.start + share.num_tokens
        if share.start != state.num_computed_tokens or share.num_tokens < 1 or end > len(state.token_ids):
            raise SchedulingError(
                f"{share} of {len(state.token_ids)} tokens, {state.num_computed_tokens} computed"
            )
        if share.samples != (end == len(state.token_ids)):
            raise SchedulingError(f"{share} of {len(state.token_ids)} tokens")
        if len(state.token_ids) >= self._spec.max_model_len:
            raise SchedulingError(f"{share.request_id!r} is longer than the model allows")
        if len(state.block_ids) != -(-end // self._spec.block_size):
            raise SchedulingError(f"{share} has {len(state.block_ids)} blocks")

    def _slot(self, state: _State, position: int) -> int:
        block_size = self._spec.block_size
        return state.block_ids[position // block_size] * block_size + position % block_size

    def _read(self, state: _State, num_tokens: int) -> int:
        """The prefix hash after ``num_tokens`` tokens, if every slot up to there holds what it must."""
        prefix_hash = EMPTY_PREFIX
        for position in range(num_tokens):
            prefix_hash = extend_hash(prefix_hash, state.token_ids[position])
            slot = self._slot(state, position)
            if self._slots[slot] != prefix_hash:
                raise SchedulingError(f"slot {slot} does not hold token {position} of {state.token_ids}")
        return prefix_hash

    def _write(self, state: _State, share: ScheduledSequence) -> None:
        prefix_hash = self._slots[self._slot(state, share.start - 1)] if share.start else EMPTY_PREFIX
        for position in range(share.start, share.start + share.num_tokens):
            prefix_hash = extend_hash(prefix_hash, state.token_ids[position])
            self._slots[self._slot(state, position)] = prefix_hash
        state.num_computed_tokens += share.num_tokens

    def _destroy(self, states: list[_State], step: SchedulerOutput) -> None:
        for share, state in zip(step.scheduled, states, strict=True):
            state.is_broken = True
            for position in range(share.start, share.start + share.num_tokens):
                self._slots[self._slot(state, position)] = _POISON

    def _sample(self, step: SchedulerOutput, states: list[_State]) -> tuple[SampledToken, ...]:
        sampled: list[SampledToken] = []
        allowed = _allowed_tokens(step.masks)
        for share, state in zip(step.scheduled, states, strict=True):
            if not share.samples:
                continue
            if state.is_broken or (step.step_id in self._invalid_at_steps and not sampled):
                state.is_broken = True
                sampled.append(SampledToken(share.request_id, 0, is_valid=False))
                continue
            prefix_hash = self._slots[self._slot(state, share.start + share.num_tokens - 1)]
            num_generated = len(state.token_ids) - state.num_prompt_tokens
            if share.request_id in allowed:
                token_id = sample_allowed(prefix_hash, state.params, allowed[share.request_id])
            else:
                token_id = sample(prefix_hash, state.params, num_generated, self._spec.vocab_size)
            state.token_ids.append(token_id)
            num_top = state.params.logprobs
            logprobs = (
                None if num_top is None else describe(prefix_hash, token_id, num_top, self._spec.vocab_size)
            )
            sampled.append(SampledToken(share.request_id, token_id, logprobs))
        return tuple(sampled)

    def _describe_prompt(self, state: _State, share: ScheduledSequence) -> tuple[TokenLogprobs, ...]:
        """Records of the prompt tokens that follow the tokens computed in this step."""
        end = min(share.start + share.num_tokens, state.num_prompt_tokens - 1)
        return tuple(
            describe(
                self._slots[self._slot(state, position)],
                state.token_ids[position + 1],
                state.params.prompt_logprobs or 0,
                self._spec.vocab_size,
            )
            for position in range(share.start, end)
        )


def _allowed_tokens(masks: TokenMasks | None) -> dict[str, list[int]]:
    if masks is None:
        return {}
    size = len(masks.bits) // len(masks.request_ids)
    rows = [
        int.from_bytes(masks.bits[i * size : (i + 1) * size], "little") for i in range(len(masks.request_ids))
    ]
    return {
        request_id: [token_id for token_id in range(row.bit_length()) if row >> token_id & 1]
        for request_id, row in zip(masks.request_ids, rows, strict=True)
    }
