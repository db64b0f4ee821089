"""A prefix that several requests have in common is computed once, also if they come together."""

from __future__ import annotations

import dataclasses

import pytest

from scheduler.engine_core import EngineCore
from scheduler.hashing_executor import HashingExecutor, run_alone
from scheduler.messages import Request, SamplingParams, SchedulerOutput
from scheduler.scheduler import Scheduler
from tests.scheduler.test_scheduler import BLOCK_SIZE, advance, answer, request, schedule, scheduler


def admitted(step: SchedulerOutput) -> list[tuple[str, int]]:
    """Who is new in a step, and how many tokens of it were known."""
    return [(new.request_id, new.num_computed_tokens) for new in step.new]


def same(one: Scheduler, names: str, num_tokens: int) -> None:
    for name in names:
        one.add(request(name, num_tokens, first=1))


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_choices_of_one_prompt_hold_its_blocks_once(max_in_flight: int) -> None:
    executor = HashingExecutor(
        64, 4, vocab_size=50, max_num_seqs=8, max_num_batched_tokens=100, max_in_flight=max_in_flight
    )
    core = EngineCore(executor)
    prompt = tuple(range(42))  # ten blocks and a half
    requests = [
        Request(str(seed), prompt, SamplingParams(seed=seed, max_tokens=6, stop_token_ids=()))
        for seed in range(4)
    ]
    for each in requests:
        core.add_request(each)
    used, got = 0.0, {each.request_id: [] for each in requests}  # type: ignore[var-annotated]
    while core.has_work:
        for output in core.step().outputs:
            got[output.request_id] += output.token_ids
        used = max(used, core.stats.kv_cache_usage)
        core.check_invariants()
    core.shutdown()
    assert {each.request_id: run_alone(each, executor.spec)[0] for each in requests} == got
    assert used * 64 == 10 + 4 * 2  # 42 tokens and 5 computed behind them
    assert core.stats.scheduled_tokens_total == 42 + 3 * 2 + 4 * 5


def test_a_prompt_in_chunks_is_awaited_to_its_end() -> None:
    one = scheduler(budget=8)
    same(one, "ab", 22)
    steps = [advance(one) for _ in range(4)]
    assert [admitted(step) for step in steps] == [[("a", 0)], [], [], [("b", 20)]]


def test_others_go_before_those_who_wait() -> None:
    one = scheduler()
    same(one, "ab", 12)
    one.add(request("c", 8))
    assert admitted(schedule(one)) == [("a", 0), ("c", 0)]


def test_who_waits_goes_first_when_the_wait_is_over() -> None:
    one = scheduler(max_num_seqs=2)
    same(one, "ab", 12)
    step = schedule(one)
    one.add(request("c", 8))
    one.update(step, answer(step))
    assert admitted(schedule(one)) == [("b", 8)]


def test_only_what_is_shared_is_awaited() -> None:
    one = scheduler(budget=8)
    one.add(request("a", 30, first=1))
    start = request("a", 6, first=1).prompt_token_ids
    one.add(Request("b", (*start, 500, 501, 502, 503)))
    assert admitted(advance(one)) == [("a", 0)]
    one.abort("a")
    assert admitted(advance(one)) == [("b", BLOCK_SIZE)]


@pytest.mark.parametrize("end", ["abort", "fail"])
def test_when_the_first_ends_the_next_computes(end: str) -> None:
    one = scheduler()
    same(one, "abc", 12)
    step = schedule(one)
    if end == "abort":
        one.abort("a")
        assert admitted(schedule(one)) == [("b", 0)]
    else:
        one.fail(step, RuntimeError("lost"))
        step = schedule(one)
        assert admitted(step) == [("a", 0)]  # it is tried again
        one.fail(step, RuntimeError("lost"))
        assert admitted(schedule(one)) == [("b", 0)]


def test_a_preempted_one_is_not_awaited() -> None:
    one = scheduler(num_blocks=8, budget=12)
    one.add(request("x", 16))
    advance(one)
    same(one, "ab", 11)
    names = []
    while one.has_work:
        step = one.schedule()
        one.check_invariants()
        if step is not None:
            names += [name for name, _ in admitted(step)]
            one.update(step, answer(step))
        one.take_outputs()
    assert names.count("a") >= 2, "it was never preempted"
    assert "b" in names


def test_different_salts_share_nothing() -> None:
    one = scheduler()
    one.add(request("a", 12, first=1))
    one.add(dataclasses.replace(request("b", 12, first=1), cache_salt="other"))
    assert admitted(schedule(one)) == [("a", 0), ("b", 0)]


def test_who_reads_the_whole_prompt_does_not_wait() -> None:
    one = scheduler()
    one.add(request("a", 12, first=1))
    one.add(request("b", 12, first=1, prompt_logprobs=1))
    assert admitted(schedule(one)) == [("a", 0), ("b", 0)]


def test_a_prompt_shorter_than_a_block_is_not_awaited() -> None:
    one = scheduler()
    same(one, "ab", BLOCK_SIZE)
    assert admitted(schedule(one)) == [("a", 0), ("b", 0)]
