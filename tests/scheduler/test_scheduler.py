"""Steps one by one: who is in them, in which order, with which blocks."""

from __future__ import annotations

import pytest

from scheduler.grammars import NoGrammars
from scheduler.messages import (
    EngineOutput,
    FinishReason,
    ModelRunnerOutput,
    Request,
    SampledToken,
    SamplingParams,
    SchedulerOutput,
)
from scheduler.scheduler import Scheduler
from scheduler.scheduler_config import SchedulerConfig
from scheduler.step import Step

BLOCK_SIZE = 4


def scheduler(
    num_blocks: int = 100,
    max_num_seqs: int = 8,
    budget: int = 100,
    max_model_len: int = 100,
    attention_parity: int = 0,
    saturating_num_tokens: int = 0,
) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            num_blocks,
            BLOCK_SIZE,
            max_num_seqs,
            budget,
            max_model_len,
            vocab_size=1000,
            attention_parity=attention_parity,
            saturating_num_tokens=saturating_num_tokens,
        ),
        NoGrammars(),
    )


def request(
    name: str, num_tokens: int = 4, priority: int = 0, first: int | None = None, **params: object
) -> Request:
    """A prompt unlike that of any other name, unless ``first`` says how it begins."""
    start = ord(name[0]) if first is None else first
    prompt = tuple((start + position * 7) % 1000 for position in range(num_tokens))
    return Request(name, prompt, SamplingParams(**{"max_tokens": 50, **params}), priority=priority)  # type: ignore[arg-type]


def answer(step: SchedulerOutput, token_id: int = 7) -> ModelRunnerOutput:
    return ModelRunnerOutput(
        step.step_id,
        tuple(SampledToken(share.request_id, token_id) for share in step.scheduled if share.samples),
    )


def schedule(one: Scheduler) -> SchedulerOutput:
    step = one.schedule()
    one.check_invariants()
    assert step is not None
    return step


def advance(one: Scheduler, token_id: int = 7) -> SchedulerOutput:
    step = schedule(one)
    one.update(step, answer(step, token_id))
    one.check_invariants()
    return step


def shares(step: SchedulerOutput) -> list[tuple[str, int, int, bool]]:
    return [(share.request_id, share.start, share.num_tokens, share.samples) for share in step.scheduled]


def test_a_prompt_is_computed_in_chunks_beside_those_who_decode() -> None:
    one = scheduler(budget=8)
    one.add(request("a", 5))
    assert shares(advance(one)) == [("a", 0, 5, True)]
    one.add(request("b", 17))
    one.add(request("c", 9))
    assert shares(advance(one)) == [("a", 5, 1, True), ("b", 0, 7, False)]
    assert shares(advance(one)) == [("a", 6, 1, True), ("b", 7, 7, False)]
    assert shares(advance(one)) == [("a", 7, 1, True), ("b", 14, 3, True), ("c", 0, 4, False)]
    assert shares(advance(one)) == [("a", 8, 1, True), ("b", 17, 1, True), ("c", 4, 5, True)]


def test_blocks_are_handed_out_as_tokens_need_them() -> None:
    one = scheduler(budget=6)
    one.add(request("a", 9))
    step = advance(one)
    assert step.new[0].block_ids == ()
    assert step.new[0].token_ids == request("a", 9).prompt_token_ids
    assert len(step.scheduled[0].new_block_ids) == 2
    assert [len(advance(one).scheduled[0].new_block_ids) for _ in range(9)] == [1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_the_second_request_hits_the_blocks_of_the_first() -> None:
    one = scheduler()
    one.add(request("a", 8, first=1, max_tokens=2))
    advance(one)
    one.add(request("b", 8, first=1))  # never a hit for all tokens: one must be computed
    one.add(request("c", 11, first=1))
    one.add(request("d", 11, first=1, prompt_logprobs=0))
    one.add(request("e", 11, first=2))
    step = advance(one)
    assert shares(step)[1:] == [("b", 4, 4, True), ("c", 8, 3, True), ("d", 0, 11, True), ("e", 0, 11, True)]
    hits = [new.block_ids for new in step.new]
    assert hits[0] == hits[1][:1]
    assert [len(block_ids) for block_ids in hits] == [1, 2, 0, 0]
    assert [output.num_cached_tokens for output in one.take_outputs()[2:]] == [4, 8, 0, 0]
    assert one.stats.prefix_cache_queries_total == 8 + 8 + 11 + 11
    assert one.stats.prefix_cache_hits_total == 12


def test_generated_tokens_are_hit_too() -> None:
    one = scheduler()
    one.add(request("a", 4, max_tokens=5))
    for _ in range(5):
        advance(one)
    assert one.take_outputs()[-1].finish_reason is FinishReason.LENGTH
    turn = Request("b", (*request("a", 4).prompt_token_ids, 7, 7, 7, 7, 7, 9))
    one.add(turn)
    assert shares(advance(one)) == [("b", 8, 2, True)]


def test_blocks_are_shared_only_after_the_step_that_fills_them_has_succeeded() -> None:
    one = scheduler(max_num_seqs=4)
    one.add(request("a", 9, first=1))
    one.add(request("b", 9, first=1))  # could be in the same step
    first = schedule(one)
    one.add(request("c", 9, first=1))  # could be in a step issued while the first is in flight
    second = schedule(one)
    assert [new.request_id for new in (*first.new, *second.new)] == ["a"]
    one.update(first, answer(first))
    assert [new.num_computed_tokens for new in schedule(one).new] == [8, 8]


def test_a_failed_step_leaves_nothing_in_the_cache() -> None:
    one = scheduler()
    one.add(request("a", 9, first=1))
    failed = schedule(one)
    one.fail(failed, OSError("no device"))
    one.check_invariants()
    assert one.take_outputs() == ()
    assert one.stats.kv_cache_usage == 0
    again = schedule(one)
    assert (again.released, again.new[0].num_computed_tokens) == (("a",), 0)
    one.fail(again, OSError("no device"))
    one.check_invariants()
    (output,) = one.take_outputs()
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, "OSError: no device")
    assert one.stats.kv_cache_usage == 0
    one.add(request("b", 9, first=1))
    step = advance(one)
    assert step.released == ("a",)
    assert step.new[0].num_computed_tokens == 0


def test_a_failed_step_does_not_touch_who_is_only_in_the_next() -> None:
    one = scheduler()
    one.add(request("a"))
    first = schedule(one)
    one.add(request("b"))
    second = schedule(one)
    assert [share.request_id for share in second.scheduled] == ["a", "b"]
    one.fail(first, RuntimeError("x"))
    one.update(second, answer(second))
    assert [output.request_id for output in one.take_outputs()] == ["b"]
    assert shares(advance(one)) == [("a", 0, 4, True)]  # apart from the others
    assert shares(advance(one)) == [("b", 4, 1, True), ("a", 4, 1, True)]


def test_sequences_of_a_failed_step_are_tried_again_in_halves() -> None:
    one = scheduler()
    for name in "abcd":
        one.add(request(name))
    advance(one)
    assert len(one.take_outputs()) == 4
    names = []
    for fails in (True, False, True, False, True, False):
        step = schedule(one)
        names.append("".join(share.request_id for share in step.scheduled))
        if fails:
            one.fail(step, RuntimeError("x"))
        else:
            one.update(step, answer(step))
    one.check_invariants()
    assert names == ["abcd", "ab", "cd", "c", "d", "abc"]
    assert [output.request_id for output in one.take_outputs() if output.error] == ["d"]


def test_a_result_that_does_not_answer_the_step_fails_it() -> None:
    one = scheduler()
    one.add(request("a"))
    one.add(request("b"))
    step = schedule(one)
    one.update(step, ModelRunnerOutput(step.step_id, tuple(reversed(answer(step).sampled))))
    assert one.take_outputs() == ()
    assert shares(advance(one)) == [("a", 0, 4, True)]
    assert shares(advance(one)) == [("b", 0, 4, True)]


def test_results_come_in_the_order_of_steps() -> None:
    one = scheduler()
    one.add(request("a"))
    schedule(one)
    second = schedule(one)
    with pytest.raises(ValueError, match="step 2 is not the oldest"):
        one.update(second, answer(second))


def test_an_invalid_token_fails_its_request_alone() -> None:
    one = scheduler()
    one.add(request("a"))
    one.add(request("b"))
    step = schedule(one)
    sampled = (SampledToken("a", 0, is_valid=False), SampledToken("b", 7))
    one.update(step, ModelRunnerOutput(step.step_id, sampled))
    failed, fine = one.take_outputs()
    assert (failed.request_id, failed.token_ids, failed.finish_reason) == ("a", (), FinishReason.ERROR)
    assert "finite" in (failed.error or "")
    assert (fine.token_ids, fine.finish_reason) == ((7,), None)


def test_the_newest_is_preempted_and_comes_back_with_its_tokens_and_hits() -> None:
    one = scheduler(num_blocks=5)
    one.add(request("a", 6))
    one.add(request("b", 5))
    advance(one)
    assert one.stats.num_running == 2
    advance(one)
    advance(one)  # a: 9 tokens, 8 computed; b: 8 tokens, 7 computed
    step = advance(one)  # a takes the last free block
    assert [len(share.new_block_ids) for share in step.scheduled] == [1, 0]
    step = advance(one)  # b needs one for its 9th
    assert shares(step) == [("a", 9, 1, True)]
    assert step.released == ("b",)
    assert (one.stats.num_running, one.stats.num_waiting, one.stats.preemptions_total) == (1, 1, 1)
    one.abort("a")
    step = advance(one)
    assert step.released == ("a",)
    (back,) = step.new
    assert back.token_ids == (*request("b", 5).prompt_token_ids, 7, 7, 7, 7)
    assert (back.num_prompt_tokens, back.num_computed_tokens) == (5, 8)
    assert shares(step) == [("b", 8, 1, True)]
    last = one.take_outputs()[-1]
    assert (last.request_id, last.num_cached_tokens) == ("b", 0)  # the first admission had no hits
    assert one.stats.prefix_cache_queries_total == 11  # and only the first one counts


def test_the_one_preempted_is_the_least_important_even_if_it_was_scheduled_already() -> None:
    one = scheduler(num_blocks=4)
    one.add(request("b", 5, priority=1))
    advance(one)
    one.add(request("a", 4, priority=0))
    step = advance(one)
    assert [share.request_id for share in step.scheduled] == ["b", "a"]
    step = advance(one)  # a takes the fourth block
    step = advance(one)
    step = advance(one)  # b has 9 tokens and needs one more: it is the least important itself
    assert step.released == ("b",)
    assert [share.request_id for share in step.scheduled] == ["a"]


def in_step_until_only_one_block_is_left() -> Scheduler:
    """Both have 8 tokens computed and 9 known, a comes second in the batch, and both need a block next."""
    one = scheduler(num_blocks=5)
    one.add(request("b", 5, priority=1))
    advance(one)
    one.add(request("a", 6))
    for _ in range(2):
        assert [share.request_id for share in advance(one).scheduled] == ["b", "a"]
    return one


def test_a_scheduled_victim_is_taken_out_of_the_step() -> None:
    one = in_step_until_only_one_block_is_left()
    advance(one)
    step = advance(one)
    assert step.released == ("b",)
    assert shares(step) == [("a", 8, 1, True)]
    one.abort("a")
    (back,) = advance(one).new
    assert back.token_ids[5:] == (7, 7, 7, 7)


def test_a_scheduled_victim_gives_its_budget_back() -> None:
    one = in_step_until_only_one_block_is_left()
    sequence = one._running[0]
    step = Step(10, 0, is_retry=False)
    one._take(sequence, 1, (), step)
    assert step.budget == 9
    one._preempt(sequence, step)
    assert (step.budget, step.shares) == (10, {})


def test_what_is_in_flight_at_a_preemption_still_counts() -> None:
    one = in_step_until_only_one_block_is_left()
    in_flight = schedule(one)
    assert [share.request_id for share in in_flight.scheduled] == ["b", "a"]
    step = schedule(one)
    assert step.released == ("b",)
    one.abort("a")
    one.take_outputs()
    assert one.schedule() is None  # b has room now, but its last token is not known
    one.update(in_flight, answer(in_flight, 8))
    assert [(output.request_id, output.token_ids) for output in one.take_outputs()] == [("b", (8,))]
    assert schedule(one).new[0].token_ids[5:] == (7, 7, 7, 8)


@pytest.mark.parametrize("params", [{"stop_token_ids": (8,)}, {"max_tokens": 4}])
def test_a_preempted_sequence_may_end_with_what_it_has_in_flight(params: dict[str, object]) -> None:
    one = scheduler(num_blocks=5)
    one.add(request("b", 5, priority=1, **params))  # type: ignore[arg-type]
    advance(one)
    one.add(request("a", 6))
    for _ in range(2):
        advance(one)
    in_flight = schedule(one)
    schedule(one)
    one.take_outputs()
    one.update(in_flight, answer(in_flight, 8))
    assert [output.finish_reason for output in one.take_outputs() if output.request_id == "b"] != [None]
    one.check_invariants()
    assert (one.stats.num_running, one.stats.num_waiting) == (1, 0)


def test_nobody_is_admitted_who_would_be_preempted_at_once() -> None:
    one = scheduler(num_blocks=4)
    one.add(request("a", 7))
    advance(one)
    one.add(request("b", 5))
    advance(one)
    assert (one.stats.num_running, one.stats.num_waiting) == (
        1,
        1,
    )  # it would fit, but a needs a block soon
    one.abort("a")
    advance(one)
    assert one.stats.num_running == 1


def test_nobody_overtakes_the_first_in_line() -> None:
    one = scheduler(num_blocks=6)
    one.add(request("a", 12))
    advance(one)
    one.add(request("b", 16))
    one.add(request("c", 2))
    assert [share.request_id for share in advance(one).scheduled] == ["a"]
    one.abort("b")
    assert [share.request_id for share in advance(one).scheduled] == ["a", "c"]


def test_no_more_than_max_num_seqs_run() -> None:
    one = scheduler(max_num_seqs=2)
    for name in "abc":
        one.add(request(name, max_tokens=2))
    assert [share.request_id for share in advance(one).scheduled] == ["a", "b"]
    advance(one)
    assert [share.request_id for share in advance(one).scheduled] == ["c"]


def test_priorities_go_before_arrival() -> None:
    one = scheduler(max_num_seqs=1)
    one.add(request("a", priority=1, max_tokens=1))
    one.add(request("b", priority=0, max_tokens=1))
    one.add(request("c", priority=-5, max_tokens=1))
    assert [advance(one).new[0].request_id for _ in range(3)] == ["c", "b", "a"]


def test_two_steps_in_flight_never_compute_behind_the_last_token() -> None:
    one = scheduler()
    one.add(request("a", 4, max_tokens=2))
    first, second = schedule(one), schedule(one)
    assert one.schedule() is None
    assert shares(second) == [("a", 4, 1, True)]
    one.update(first, answer(first))
    one.update(second, answer(second))
    assert [output.finish_reason for output in one.take_outputs()] == [None, FinishReason.LENGTH]
    assert not one.has_work


def test_what_is_computed_behind_a_stop_token_is_dropped() -> None:
    one = scheduler()
    one.add(request("a", 4, stop_token_ids=(7,)))
    first, second = schedule(one), schedule(one)
    one.update(first, answer(first))
    assert one.stats.kv_cache_usage == 0
    one.add(request("a", 4, first=3))  # the name is free again, though a step with the old one is in flight
    third = schedule(one)
    assert third.released == ("a",)
    assert third.new[0].request_id == "a"
    one.update(second, answer(second, 99))
    one.check_invariants()
    one.update(third, answer(third, 5))
    assert [output.token_ids for output in one.take_outputs()] == [(7,), (5,)]


@pytest.mark.parametrize("moment", ["waiting", "in flight", "running", "finished", "unknown"])
def test_abort_at_any_moment(moment: str) -> None:
    one = scheduler()
    one.add(request("a", 9, max_tokens=1 if moment == "finished" else 5))
    step = None
    if moment != "waiting":
        step = schedule(one)
    if step and moment != "in flight":
        one.update(step, answer(step))
    one.take_outputs()
    one.abort("x" if moment == "unknown" else "a")
    one.abort("a")
    one.abort("a")
    one.check_invariants()
    expected = [] if moment == "finished" else [FinishReason.ABORT]
    assert [output.finish_reason for output in one.take_outputs()] == expected
    if step and moment == "in flight":
        one.update(step, answer(step))
    assert one.take_outputs() == ()
    assert one.stats.kv_cache_usage == 0
    assert not one.has_work


def test_a_request_that_can_never_run_ends_at_once_and_blocks_nobody() -> None:
    one = scheduler(num_blocks=2)
    one.add(request("a", 9))
    one.add(request("b", 8))
    (output,) = one.take_outputs()
    assert (output.request_id, output.finish_reason) == ("a", FinishReason.ERROR)
    assert "2 KV blocks" in (output.error or "")
    assert shares(advance(one)) == [("b", 0, 8, True)]


def test_alone_in_the_pool_a_sequence_ends_by_length_when_the_pool_is_full() -> None:
    one = scheduler(num_blocks=2)
    one.add(request("a", 3))
    outputs: list[EngineOutput] = []
    while one.has_work:
        advance(one)
        outputs += one.take_outputs()
    assert len(outputs) == 2 * BLOCK_SIZE + 1 - 3
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert one.stats.preemptions_total == 0


def test_an_id_is_free_again_when_its_request_is_finished() -> None:
    one = scheduler()
    one.add(request("a"))
    with pytest.raises(ValueError, match="'a' is running already"):
        one.add(request("a"))
    one.abort("a")
    one.add(request("a"))
    advance(one)
    assert len(one.take_outputs()) == 2


def test_the_first_time_of_scheduling_stays() -> None:
    one = scheduler(num_blocks=5)
    one.add(request("a", 6))
    one.add(request("b", 5))
    while one.stats.preemptions_total == 0:
        advance(one)
    one.abort("a")
    advance(one)
    times = {output.first_scheduled_time for output in one.take_outputs() if output.request_id == "b"}
    assert len(times) == 1
    assert times.pop() > 0


def test_the_invariants_notice_a_lost_block() -> None:
    one = scheduler()
    one.add(request("a", 9))
    advance(one)
    one._running[0].block_ids.pop()
    with pytest.raises(AssertionError):
        one.check_invariants()
