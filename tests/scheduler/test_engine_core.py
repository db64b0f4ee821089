"""The step loop with a real executor behind it: waiting, failing, overlapping, ending."""

from __future__ import annotations

import inspect
import itertools
import random
from concurrent.futures import Future
from dataclasses import replace

import pytest

from scheduler.engine_core import EngineCore
from scheduler.executor import ExecutorLostError
from scheduler.hashing_executor import HashingExecutor, run_alone
from scheduler.messages import (
    EngineOutput,
    FinishReason,
    ModelRunnerOutput,
    Request,
    SamplingParams,
    SchedulerOutput,
)

IN_FLIGHT = pytest.mark.parametrize("max_in_flight", [1, 2])


def drain(engine: EngineCore) -> dict[str, list[EngineOutput]]:
    outputs: dict[str, list[EngineOutput]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_invariants()
    return outputs


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def request(name: str, *, salt: str | None = None, **params: object) -> Request:
    prompt = tuple(map(int, f"{sum(map(ord, name)) * 7919:040b}"))
    return Request(name, prompt, SamplingParams(**{"max_tokens": 9, **params}), cache_salt=salt)  # type: ignore[arg-type]


def test_the_step_loop_fits_on_one_screen() -> None:
    assert len(inspect.getsource(EngineCore.step).splitlines()) <= 24


def test_a_step_without_work_returns_at_once() -> None:
    engine = EngineCore(HashingExecutor(8, 4))
    assert not engine.has_work
    result = engine.step()
    assert (result.outputs, result.stats.steps_total) == ((), 0)


@IN_FLIGHT
def test_requests_run_together_as_they_do_alone(max_in_flight: int) -> None:
    executor = HashingExecutor(64, 4, max_num_batched_tokens=16, max_in_flight=max_in_flight)
    engine = EngineCore(executor)
    requests = [request(f"r{index}", seed=index, stop_token_ids=(1,), min_tokens=index) for index in range(9)]
    for one in requests:
        engine.add_request(one)
    outputs = drain(engine)
    for one in requests:
        expected, reason = run_alone(one, executor.spec)
        assert tokens(outputs[one.request_id]) == expected
        assert outputs[one.request_id][-1].finish_reason is reason
    engine.shutdown()


def test_two_steps_are_in_flight_if_the_executor_allows_it() -> None:
    executor = HashingExecutor(64, 4, max_in_flight=2)
    engine = EngineCore(executor)
    engine.add_request(request("a", max_tokens=4))
    assert engine.step().outputs == ()  # handed over, not waited for
    (output,) = engine.step().outputs
    assert len(output.token_ids) == 1
    assert engine.stats.steps_total == 2
    assert sum(len(one.token_ids) for one in drain(engine)["a"]) == 3
    engine.shutdown()


@IN_FLIGHT
def test_the_sequences_of_a_failed_step_go_on(max_in_flight: int, caplog: pytest.LogCaptureFixture) -> None:
    executor = HashingExecutor(
        64, 4, max_num_seqs=2, max_num_batched_tokens=100, max_in_flight=max_in_flight, fail_at_steps=(3,)
    )
    engine = EngineCore(executor)
    requests = [request(name, salt=name) for name in "abcd"]
    for one in requests:
        engine.add_request(one)
    outputs = drain(engine)
    assert "step 3 of 2 sequences failed" in caplog.text
    assert "Traceback" in caplog.text
    for one in requests:
        assert tokens(outputs[one.request_id]) == run_alone(one, executor.spec)[0]
        assert outputs[one.request_id][-1].finish_reason is FinishReason.LENGTH
    assert engine.stats.kv_cache_usage == 0
    engine.shutdown()


class _Counting(HashingExecutor):
    """Notes the tokens of each step."""

    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)
        self.num_tokens: list[int] = []

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        self.num_tokens.append(step.num_tokens)
        return super().execute(step)


@IN_FLIGHT
def test_each_call_of_step_counts_the_tokens_of_its_step(max_in_flight: int) -> None:
    executor = _Counting(24, 4, max_num_batched_tokens=16, max_in_flight=max_in_flight)
    engine = EngineCore(executor)
    for index in range(6):
        engine.add_request(request(f"r{index}", max_tokens=20))
    totals = [0]
    while engine.has_work:
        totals.append(engine.step().stats.scheduled_tokens_total)
    assert engine.stats.preemptions_total > 0
    grown = [after - before for before, after in itertools.pairwise(totals)]
    assert [tokens for tokens in grown if tokens] == executor.num_tokens
    engine.shutdown()


@IN_FLIGHT
@pytest.mark.parametrize("stop_token_ids", [(), (1,)])
def test_a_request_goes_on_after_the_tokens_that_another_engine_generated(
    max_in_flight: int, stop_token_ids: tuple[int, ...]
) -> None:
    whole = request("r", seed=3, max_tokens=12, min_tokens=5, stop_token_ids=stop_token_ids, logprobs=1)
    spec = HashingExecutor(64, 4).spec
    expected, finish_reason = run_alone(whole, spec)
    for num_known in range(len(expected)):
        engine = EngineCore(HashingExecutor(64, 4, max_num_batched_tokens=16, max_in_flight=max_in_flight))
        engine.add_request(replace(whole, generated_token_ids=tuple(expected[:num_known])))
        outputs = drain(engine)["r"]
        assert tokens(outputs) == expected[num_known:]
        assert outputs[-1].finish_reason is finish_reason


@IN_FLIGHT
def test_long_prompts_keep_nobody_waiting_for_a_token(max_in_flight: int) -> None:
    """Prompts of 20 steps arrive all the time; short chats wait for those before them, and then no more."""
    budget, num_long, num_short = 16, 12, 6
    executor = HashingExecutor(
        2000,
        4,
        max_num_seqs=40,
        max_num_batched_tokens=budget,
        max_in_flight=max_in_flight,
        vocab_size=50_000,
    )
    engine = EngineCore(executor)
    arrived: dict[str, int] = {}
    tokens_at: dict[str, list[int]] = {}
    ahead: dict[str, int] = {}
    unbegun: dict[str, int] = {}
    num_steps = 0
    while num_steps < 40 or engine.has_work:
        if num_steps % 3 == 0 and num_steps < 3 * num_long:
            unbegun[f"long{num_steps}"] = 20 * budget
            long = tuple(range(1000 * num_steps, 1000 * num_steps + 20 * budget))
            engine.add_request(Request(f"long{num_steps}", long, SamplingParams(max_tokens=2)))
        if num_steps % 6 == 1 and num_steps < 6 * num_short:
            name = f"short{num_steps}"
            ahead[name], arrived[name], unbegun[name] = sum(unbegun.values()), num_steps, 4
            engine.add_request(Request(name, (num_steps, 1, 2, 3), SamplingParams(max_tokens=20)))
        for output in engine.step().outputs:
            unbegun.pop(output.request_id, None)
            if output.token_ids:
                tokens_at.setdefault(output.request_id, []).append(num_steps)
        num_steps += 1
    assert len(arrived) == num_short
    for name, began in arrived.items():
        first, *_, last = tokens_at[name]
        assert first - began <= 2 * ahead[name] / budget + max_in_flight + 1
        assert last - first == 19  # one in every step, whatever else is computed
    engine.shutdown()


@IN_FLIGHT
def test_a_lost_device_ends_the_loop(max_in_flight: int) -> None:
    class Lost(HashingExecutor):
        def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
            if step.step_id < 3:
                return super().execute(step)
            future: Future[ModelRunnerOutput] = Future()
            future.set_exception(ExecutorLostError("an illegal address was read"))
            return future

    engine = EngineCore(Lost(64, 4, max_in_flight=max_in_flight))
    engine.add_request(request("r"))
    with pytest.raises(ExecutorLostError, match="illegal address"):
        drain(engine)


@IN_FLIGHT
def test_the_prompt_of_a_failed_step_is_not_in_the_cache(max_in_flight: int) -> None:
    engine = EngineCore(HashingExecutor(64, 4, max_in_flight=max_in_flight, fail_at_steps=(1, 2, 3)))
    engine.add_request(request("a"))
    failed = drain(engine)["a"][-1]
    last_step = 2 * max_in_flight - (
        max_in_flight > 1
    )  # the one in flight beside the first counts for nothing
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error == f"RuntimeError: step {last_step} was told to fail"
    engine.add_request(request("a"))
    outputs = drain(engine)["a"]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert outputs[0].num_cached_tokens == 0
    engine.add_request(request("a"))
    assert drain(engine)["a"][0].num_cached_tokens == 36
    engine.shutdown()


@IN_FLIGHT
def test_an_invalid_token_ends_one_request(max_in_flight: int) -> None:
    engine = EngineCore(HashingExecutor(64, 4, max_in_flight=max_in_flight, invalid_at_steps=(2,)))
    engine.add_request(request("a"))
    engine.add_request(request("b"))
    outputs = drain(engine)
    assert (len(tokens(outputs["a"])), outputs["a"][-1].finish_reason) == (1, FinishReason.ERROR)
    assert (len(tokens(outputs["b"])), outputs["b"][-1].finish_reason) == (9, FinishReason.LENGTH)
    engine.shutdown()


@IN_FLIGHT
def test_an_aborted_request_frees_its_blocks_at_once(max_in_flight: int) -> None:
    engine = EngineCore(HashingExecutor(64, 4, max_in_flight=max_in_flight))
    engine.add_request(request("a", max_tokens=100))
    for _ in range(3):
        engine.step()
    assert engine.stats.kv_cache_usage > 0
    engine.abort("a")
    assert engine.stats.kv_cache_usage == 0
    assert engine.has_work
    outputs = drain(engine)["a"]
    assert [output.finish_reason for output in outputs] == [FinishReason.ABORT]
    engine.abort("a")
    assert drain(engine) == {}
    engine.shutdown()


def test_salts_keep_prefixes_apart() -> None:
    engine = EngineCore(HashingExecutor(64, 4))
    hits = []
    for salt in (None, "x", "y", "x", None):
        engine.add_request(request("a", salt=salt))
        hits.append(drain(engine)["a"][0].num_cached_tokens)
    assert hits == [0, 0, 0, 36, 36]


def test_a_duplicate_id_is_an_error() -> None:
    engine = EngineCore(HashingExecutor(64, 4))
    engine.add_request(request("a"))
    with pytest.raises(ValueError, match="'a'"):
        engine.add_request(request("a"))
    assert len(tokens(drain(engine)["a"])) == 9


def test_what_can_never_run_is_answered_with_the_next_step() -> None:
    engine = EngineCore(HashingExecutor(64, 4, max_model_len=16))
    engine.add_request(request("a"))
    assert engine.has_work
    (output,) = engine.step().outputs
    assert output.finish_reason is FinishReason.ERROR
    assert "40 tokens" in (output.error or "")
    assert drain(engine) == {}


@IN_FLIGHT
def test_shutdown_waits_for_steps_in_flight(max_in_flight: int) -> None:
    engine = EngineCore(
        HashingExecutor(64, 4, max_in_flight=max_in_flight, step_seconds=0.02, fail_at_steps=(1,))
    )
    engine.add_request(request("a"))
    engine.step()
    engine.shutdown()


def test_wasted_work_and_the_time_of_each_phase_are_counted() -> None:
    executor = HashingExecutor(24, 4, vocab_size=50_000, max_num_batched_tokens=16, step_seconds=0.001)
    engine = EngineCore(executor)
    requests = [
        Request(f"r{number}", tuple(range(100 * number, 100 * number + 12)), SamplingParams(max_tokens=40))
        for number in range(1, 6)
    ]
    for asked in requests:
        engine.add_request(asked)
    drain(engine)
    stats = engine.stats
    assert stats.preemptions_total > 0
    # No two requests share anything: each token but the last is needed once, the rest is waste.
    assert stats.scheduled_tokens_total - 5 * (12 + 40 - 1) == stats.recomputed_tokens_total > 0
    assert stats.execute_seconds_total > 0.001 * stats.steps_total
    assert 0 < stats.schedule_seconds_total < stats.execute_seconds_total
    assert 0 < stats.update_seconds_total < stats.execute_seconds_total


@IN_FLIGHT
def test_flushes_between_any_steps_change_no_token(max_in_flight: int) -> None:
    spec = HashingExecutor(64, 4).spec
    num_preemptions = 0
    for seed in range(6):
        draw = random.Random(seed)
        executor = HashingExecutor(24, 4, max_num_batched_tokens=16, max_in_flight=max_in_flight)
        engine = EngineCore(executor)
        requests = [request(name, seed=seed, max_tokens=draw.randint(1, 30)) for name in "aabbcc"]
        requests = [replace(one, request_id=f"{number}") for number, one in enumerate(requests)]
        outputs: dict[str, list[EngineOutput]] = {}
        waiting = list(requests)
        while waiting or engine.has_work:
            if waiting and draw.random() < 0.2:
                engine.add_request(waiting.pop())
            if draw.random() < 0.3:
                engine.flush_prefix_cache()
            for output in engine.step().outputs:
                outputs.setdefault(output.request_id, []).append(output)
            engine.check_invariants()
        for one in requests:
            assert tokens(outputs[one.request_id]) == run_alone(one, spec)[0]
        num_preemptions += engine.stats.preemptions_total
        assert engine.stats.kv_cache_usage == 0
        engine.shutdown()
    assert num_preemptions > 0


def test_after_a_flush_nothing_is_hit() -> None:
    engine = EngineCore(HashingExecutor(64, 4))
    for flushes, hits in ((False, 0), (False, 36), (True, 0), (False, 36)):
        if flushes:
            assert engine.flush_prefix_cache() > 9
        engine.add_request(request("a"))
        assert drain(engine)["a"][0].num_cached_tokens == hits
    engine.shutdown()
