"""Random workloads through the whole step loop, checked after every step and token by token.

The executor stores a hash of the prefix in each slot and reads all of them back; a vocabulary of 2 and blocks
of 1 to 4 tokens make prefixes of different requests coincide. ``INFLIGHTD_WORKLOADS`` sets the number of
workloads of each test and makes them different ones each time.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.engine_core import EngineCore
from scheduler.hashing_executor import EMPTY_PREFIX, HashingExecutor, describe, extend_hash, run_alone
from scheduler.messages import (
    EngineOutput,
    ExecutorSpec,
    FinishReason,
    ModelRunnerOutput,
    Request,
    SamplingParams,
    SchedulerOutput,
    TokenLogprobs,
)

NUM_WORKLOADS = int(os.environ.get("INFLIGHTD_WORKLOADS", "0"))
PROFILE = settings(
    max_examples=NUM_WORKLOADS or 150,
    derandomize=not NUM_WORKLOADS,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TOTALS: Counter[str] = Counter()


@dataclass(frozen=True)
class Workload:
    """``arrivals`` and ``aborts`` are (step, index of the request)."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_in_flight: int
    attention_parity: int
    saturating_num_tokens: int
    requests: tuple[Request, ...]
    arrivals: tuple[int, ...]
    aborts: tuple[tuple[int, int], ...]
    fail_at_steps: frozenset[int] = frozenset()
    invalid_at_steps: frozenset[int] = frozenset()

    def executor(self) -> HashingExecutor:
        return HashingExecutor(
            self.num_blocks,
            self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            max_in_flight=self.max_in_flight,
            attention_parity=self.attention_parity,
            saturating_num_tokens=self.saturating_num_tokens,
            fail_at_steps=self.fail_at_steps,
            invalid_at_steps=self.invalid_at_steps,
        )


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=10)


@st.composite
def requests(draw: st.DrawFn, prefixes: list[list[int]], has_priorities: bool) -> Request:
    prompt = draw(st.sampled_from(prefixes)) + draw(TOKENS)
    params = SamplingParams(
        seed=draw(st.integers(0, 1)),
        max_tokens=draw(st.sampled_from([1, 5, 20, 30, 40])),
        min_tokens=draw(st.integers(0, 6)),
        stop_token_ids=draw(st.sampled_from([(), (), (), (1,), (0, 1)])),
        logprobs=draw(st.sampled_from([None, None, 0, 2])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 1])),
    )
    return Request(
        "",
        tuple(prompt),
        params,
        priority=draw(st.integers(-1, 1)) if has_priorities else 0,
        cache_salt=draw(st.sampled_from([None, None, "salt"])),
    )


@st.composite
def workloads(
    draw: st.DrawFn, has_priorities: bool = True, has_aborts: bool = True, has_failures: bool = False
) -> Workload:
    prefixes = [
        [],
        *draw(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=16), min_size=1, max_size=3)),
    ]
    drawn = draw(
        st.lists(requests(prefixes, has_priorities), min_size=draw(st.sampled_from([2, 8, 14])), max_size=16)
    )
    arrivals = sorted(draw(st.lists(st.integers(0, 8), min_size=len(drawn), max_size=len(drawn))))
    named = tuple(
        replace(request, request_id=f"r{index}", arrival_time=float(arrival))
        for index, (request, arrival) in enumerate(zip(drawn, arrivals, strict=True))
    )
    abort = st.tuples(st.integers(0, 60), st.integers(0, len(named) - 1))
    steps = st.frozensets(st.integers(1, 60), max_size=4)
    block_size = draw(st.sampled_from([4, 4, 2, 1]))
    return Workload(
        num_blocks=draw(st.integers(3, 14)) * 4 // block_size,
        block_size=block_size,
        max_num_seqs=draw(st.sampled_from([1, 2, 4, 6])),
        max_num_batched_tokens=draw(st.sampled_from([1, 3, 8, 24, 64])),
        max_model_len=draw(st.sampled_from([12, 32, 64])),
        max_in_flight=draw(st.integers(1, 2)),
        attention_parity=draw(st.sampled_from([0, 0, 0, 3, 30])),
        saturating_num_tokens=draw(st.sampled_from([0, 1, 6, 20])),
        requests=named,
        arrivals=tuple(arrivals),
        aborts=tuple(draw(st.lists(abort, max_size=5))) if has_aborts else (),
        fail_at_steps=draw(steps) if has_failures else frozenset(),
        invalid_at_steps=draw(steps) if has_failures else frozenset(),
    )


def heavy_workload(seed: int) -> Workload:
    """Many long requests at once on a pool for a few of them."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(2) for _ in range(rng.randrange(24))] for _ in range(3)]
    block_size = rng.choice([1, 2, 4, 4])
    requests = tuple(
        Request(
            f"r{index}",
            (*rng.choice(prefixes), *(rng.randrange(2) for _ in range(rng.randrange(1, 16)))),
            SamplingParams(
                seed=rng.randrange(2),
                max_tokens=rng.randrange(1, 40),
                min_tokens=rng.randrange(30),
                stop_token_ids=rng.choice([(), (), (1,)]),
                logprobs=rng.choice([None, 1]),
                prompt_logprobs=rng.choice([None] * 7 + [1]),
            ),
            arrival_time=float(index // 2),
            priority=rng.choice([0, 0, 0, -1, 1]),
            cache_salt=rng.choice([None, None, "salt"]),
        )
        for index in range(rng.randrange(10, 40))
    )
    return Workload(
        num_blocks=rng.randrange(44, 120) // block_size,
        block_size=block_size,
        max_num_seqs=rng.choice([3, 6, 12]),
        max_num_batched_tokens=rng.choice([4, 16, 64]),
        max_model_len=80,
        max_in_flight=rng.choice([1, 2]),
        attention_parity=rng.choice([0, 0, 10]),
        saturating_num_tokens=rng.choice([0, 0, 2, 10]),
        requests=requests,
        arrivals=tuple(index // 2 for index in range(len(requests))),
        aborts=tuple((rng.randrange(120), rng.randrange(len(requests))) for _ in range(len(requests) // 6)),
    )


def max_num_tokens(request: Request, workload: Workload) -> int:
    """Tokens of the request, prompt included, at most."""
    pool = workload.num_blocks * workload.block_size + 1
    return min(len(request.prompt_token_ids) + request.params.max_tokens, workload.max_model_len, pool)


def can_run(request: Request, workload: Workload) -> bool:
    return len(request.prompt_token_ids) < max_num_tokens(request, workload)


class WatchingExecutor:
    """Passes steps on and checks the rules of scheduling that need no knowledge of the scheduler's inside."""

    def __init__(self, workload: Workload) -> None:
        self._inner = workload.executor()
        self._has_failures = bool(workload.fail_at_steps)
        self.spec: ExecutorSpec = self._inner.spec
        self.max_in_flight = workload.max_in_flight
        requests = workload.requests
        self.orders = {r.request_id: (r.priority, r.arrival_time, index) for index, r in enumerate(requests)}
        self.limits = {r.request_id: max_num_tokens(r, workload) for r in requests}
        self.arrived: set[str] = set()
        self.finished: set[str] = set()
        self.requests = {r.request_id: r for r in requests}
        self.alive: dict[str, int] = {}  # request id -> number of its tokens, those in flight included
        # Of those alive: their tokens at admission, and how many have certainly been computed.
        self.known: dict[str, tuple[int, ...]] = {}
        self.computed: dict[str, int] = {}
        self.steps: list[SchedulerOutput] = []

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        self.steps.append(step)
        if not self._has_failures:  # whose sequences are taken out of their order
            self._check_order(step)
            self._check_progress(step)
        return self._inner.execute(step)

    def _check_order(self, step: SchedulerOutput) -> None:
        preempted = [name for name in step.released if name not in self.finished]
        for name in step.released:
            del self.alive[name]
        for name in preempted:
            assert all(self.orders[name] > self.orders[other] for other in self.alive), "not the newest"
        admitted = {new.request_id for new in step.new}
        waiting = self.arrived - self.finished - set(self.alive) - admitted
        for new in step.new:
            self.known[new.request_id] = new.token_ids
            self.computed[new.request_id] = new.num_computed_tokens
        cut = next((share.request_id for share in step.scheduled if not share.samples), None)
        for other in waiting:
            later = {name for name in admitted if self.orders[name] > self.orders[other]}
            if not later or self._awaits_prefix(other):
                continue
            # Behind a prompt that is cut there is room only for who fits whole.
            assert cut is not None, "not the first in line"
            assert cut not in later, "not the first in line"
        for share in step.scheduled:
            # With two steps in flight, this one may not be done when the next is scheduled.
            done = share.start + (share.num_tokens if self.max_in_flight == 1 else 0)
            self.computed[share.request_id] = done

    def _awaits_prefix(self, name: str) -> bool:
        """Whether somebody is computing a block that one in the queue can use."""
        request, block_size = self.requests[name], self.spec.block_size
        prompt = request.prompt_token_ids
        if request.params.prompt_logprobs is not None:
            return False
        for other in self.alive.keys() | {new.request_id for new in self.steps[-1].new}:
            if self.requests[other].cache_salt != request.cache_salt:
                continue
            common = next(
                (
                    i
                    for i, pair in enumerate(zip(prompt, self.known[other], strict=False))
                    if len(set(pair)) > 1
                ),
                # What it has generated itself before a preemption may be the same too.
                len(self.known[other]),
            )
            if self.computed[other] // block_size < common // block_size:
                return True
        return False

    def _check_progress(self, step: SchedulerOutput) -> None:
        scheduled = {share.request_id for share in step.scheduled}
        incomplete = [share for share in step.scheduled if not share.samples]
        assert len(incomplete) <= 1, "two prompts are cut"
        budget = self.spec.max_num_batched_tokens
        parity = self.spec.attention_parity
        cost = sum(
            share.num_tokens * (1 + share.start / parity)
            if parity and share.num_tokens > 1
            else share.num_tokens
            for share in step.scheduled
        )
        assert cost <= budget + 1e-6, "more work than a step may have"
        if incomplete and not parity:
            position = step.scheduled.index(incomplete[0])
            saturating = min(budget, self.spec.saturating_num_tokens or budget)
            left = saturating - sum(share.num_tokens for share in step.scheduled[:position])
            least = max(1, min(left // 4, left - len(self.alive)))
            assert incomplete[0].num_tokens >= least, "starves behind short ones"
        if budget >= self.spec.max_num_seqs or (step.num_tokens < budget and not parity):
            for name in set(self.alive) - self.finished - scheduled:
                assert self.alive[name] == self.limits[name], f"{name} was passed over"
        for new in step.new:
            self.alive[new.request_id] = len(new.token_ids)
        for share in step.scheduled:
            assert self.alive[share.request_id] < self.limits[share.request_id], "computes what nobody needs"
            self.alive[share.request_id] += share.samples

    def shutdown(self) -> None:
        self._inner.shutdown()


@dataclass
class Outcome:
    """What one request got."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    outputs: list[EngineOutput] = field(default_factory=list)

    @property
    def last(self) -> EngineOutput:
        return self.outputs[-1]


def run(workload: Workload) -> tuple[dict[str, Outcome], WatchingExecutor, EngineCore]:
    """Runs to the end and checks all that holds for every workload, failing or not."""
    executor = WatchingExecutor(workload)
    engine = EngineCore(executor)
    outcomes = {request.request_id: Outcome() for request in workload.requests}
    pending = list(zip(workload.arrivals, workload.requests, strict=True))
    num_calls = 0
    while pending or engine.has_work:
        while pending and pending[0][0] <= num_calls:
            request = pending.pop(0)[1]
            engine.add_request(request)
            if can_run(request, workload):
                executor.arrived.add(request.request_id)
        for when, index in workload.aborts:
            if when == num_calls:
                engine.abort(f"r{index}")
                if f"r{index}" in executor.arrived:
                    executor.finished.add(f"r{index}")
                engine.check_invariants()
        result = engine.step()
        engine.check_invariants()
        assert result.stats == engine.stats
        for output in result.outputs:
            outcome = outcomes[output.request_id]
            assert not outcome.outputs or outcome.last.finish_reason is None, "an output after the last"
            outcome.outputs.append(output)
            outcome.tokens += output.token_ids
            outcome.logprobs += output.logprobs or ()
            if output.finish_reason is not None:
                executor.finished.add(output.request_id)
        num_calls += 1
        assert num_calls < 5000, "no end"
    engine.shutdown()
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert stats.steps_total == len(executor.steps)
    num_queries = num_hits = 0
    for request in workload.requests:
        last = outcomes[request.request_id].last
        assert last.finish_reason is not None
        assert all(output.finish_reason is None for output in outcomes[request.request_id].outputs[:-1])
        if last.first_scheduled_time and request.params.prompt_logprobs is None:
            num_queries += len(request.prompt_token_ids)
            num_hits += last.num_cached_tokens
            assert last.num_cached_tokens < len(request.prompt_token_ids)
        else:
            assert last.num_cached_tokens == 0
    assert (stats.prefix_cache_queries_total, stats.prefix_cache_hits_total) == (num_queries, num_hits)
    TOTALS.update(
        workloads=1,
        requests=len(workload.requests),
        steps=stats.steps_total,
        generated=sum(len(outcome.tokens) for outcome in outcomes.values()),
        preemptions=stats.preemptions_total,
        hit_tokens=stats.prefix_cache_hits_total,
        aborts=sum(outcome.last.finish_reason is FinishReason.ABORT for outcome in outcomes.values()),
        errors=sum(outcome.last.finish_reason is FinishReason.ERROR for outcome in outcomes.values()),
    )
    return outcomes, executor, engine


def check_exact(request: Request, outcome: Outcome, spec: ExecutorSpec) -> None:
    """The outcome is what the request gets alone; an aborted or failed one got a beginning of it."""
    tokens, reason = run_alone(request, spec)
    if outcome.last.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
        assert outcome.tokens == tokens[: len(outcome.tokens)]
    else:
        assert (outcome.tokens, outcome.last.finish_reason) == (tokens, reason)
        assert outcome.last.error is None
    all_tokens = [*request.prompt_token_ids, *outcome.tokens]
    prefix_hashes = [EMPTY_PREFIX]
    for token_id in all_tokens:
        prefix_hashes.append(extend_hash(prefix_hashes[-1], token_id))
    num_prompt, vocab_size = len(request.prompt_token_ids), spec.vocab_size
    records = [
        describe(prefix_hashes[position], all_tokens[position], 2, vocab_size)
        for position in range(len(all_tokens))
    ]

    def with_top(record: TokenLogprobs, num_top: int) -> TokenLogprobs:
        return replace(record, top=record.top[:num_top])

    if request.params.logprobs is None:
        assert outcome.logprobs == []
    else:
        assert outcome.logprobs == [with_top(r, request.params.logprobs) for r in records[num_prompt:]]
    for index, output in enumerate(outcome.outputs):
        if request.params.prompt_logprobs is not None and output.token_ids and index == 0:
            expected = tuple(with_top(r, request.params.prompt_logprobs) for r in records[1:num_prompt])
            assert output.prompt_logprobs == expected
        else:
            assert output.prompt_logprobs is None


@PROFILE
@given(workload=workloads())
def test_every_request_gets_what_it_gets_alone(workload: Workload) -> None:
    outcomes, executor, _ = run(workload)
    aborted = {f"r{index}" for _, index in workload.aborts}
    for request in workload.requests:
        outcome = outcomes[request.request_id]
        check_exact(request, outcome, executor.spec)
        if outcome.last.finish_reason is FinishReason.ABORT:
            assert request.request_id in aborted
        else:
            assert (outcome.last.finish_reason is not FinishReason.ERROR) == can_run(request, workload)


@PROFILE
@given(workload=workloads(has_aborts=False))
def test_alone_means_alone_in_an_engine_of_its_own(workload: Workload) -> None:
    outcomes, _, _ = run(workload)
    for request in workload.requests:
        alone = replace(
            workload, requests=(request,), arrivals=(0,), max_num_batched_tokens=1000, max_in_flight=1
        )
        expected = run(alone)[0][request.request_id]
        outcome = outcomes[request.request_id]
        assert (outcome.tokens, outcome.logprobs) == (expected.tokens, expected.logprobs)
        assert outcome.last.finish_reason == expected.last.finish_reason


@PROFILE
@given(workload=workloads(has_failures=True))
def test_a_failed_step_fails_its_own_sequences_only(workload: Workload) -> None:
    outcomes, executor, _ = run(workload)
    touched = {
        share.request_id
        for step in executor.steps
        if step.step_id in workload.fail_at_steps or step.step_id in workload.invalid_at_steps
        for share in step.scheduled
    }
    for request in workload.requests:
        outcome = outcomes[request.request_id]
        check_exact(request, outcome, executor.spec)
        if outcome.last.finish_reason is FinishReason.ERROR and can_run(request, workload):
            assert request.request_id in touched
            assert outcome.last.error
    num_failed = Counter(
        share.request_id
        for step in executor.steps
        if step.step_id in workload.fail_at_steps
        for share in step.scheduled
    )
    invalid = {
        share.request_id
        for step in executor.steps
        if step.step_id in workload.invalid_at_steps
        for share in step.scheduled
    }
    for name, outcome in outcomes.items():  # one failure is nobody's end
        if num_failed[name] == 1 and name not in invalid:
            assert outcome.last.finish_reason is not FinishReason.ERROR


@PROFILE
@given(workload=workloads(has_priorities=False, has_aborts=False))
def test_every_step_brings_the_oldest_request_on(workload: Workload) -> None:
    """First come, first served: no more steps than there are tokens, whatever is preempted on the way.

    With two steps in flight, each stop token may cost one more step, computed in vain.
    """
    outcomes, executor, _ = run(workload)
    num_tokens = sum(
        len(request.prompt_token_ids) + len(outcomes[request.request_id].tokens)
        for request in workload.requests
    )
    num_wasted = len(workload.requests) if workload.max_in_flight > 1 else 0
    assert len(executor.steps) <= num_tokens + num_wasted


@settings(PROFILE, max_examples=NUM_WORKLOADS or 50)
@given(seed=st.integers(0, 2**32))
def test_heavy_load(seed: int) -> None:
    workload = heavy_workload(seed)
    outcomes, executor, _ = run(workload)
    for request in workload.requests:
        check_exact(request, outcomes[request.request_id], executor.spec)
        assert (outcomes[request.request_id].last.finish_reason is FinishReason.ERROR) != can_run(
            request, workload
        )


def test_the_workloads_were_hard() -> None:
    """Runs last: the tests above mean little unless they preempted, hit and aborted a lot."""
    print(dict(TOTALS), file=sys.stderr)
    if TOTALS["workloads"] >= 200:
        assert TOTALS["preemptions"] > 100
        assert TOTALS["hit_tokens"] > 1000
        assert TOTALS["aborts"] > 50
        assert TOTALS["errors"] > 50
