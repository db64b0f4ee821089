"""Steps that fail, by a wrapper that makes them: who is tried again with whom, and who is given up."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from scheduler.engine_core import EngineCore
from scheduler.executor import ExecutorLostError, OutOfDeviceMemoryError
from scheduler.faults import Fault, FaultsError, FaultyExecutor, parse_faults
from scheduler.hashing_executor import HashingExecutor, run_alone
from scheduler.messages import FinishReason, ModelRunnerOutput, Request, SamplingParams, SchedulerOutput
from tests.scheduler.test_engine_core import IN_FLIGHT, drain, request, tokens


class _Watched(HashingExecutor):
    """Notes who is in each step; has no memory for more than ``max_sequences`` in one."""

    max_sequences = 1000

    def __init__(self, num_blocks: int, block_size: int, *, max_in_flight: int = 1) -> None:
        super().__init__(num_blocks, block_size, max_num_seqs=16, max_in_flight=max_in_flight)
        self.steps: list[set[str]] = []

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        self.steps.append({share.request_id for share in step.scheduled})
        if len(step.scheduled) <= self.max_sequences:
            return super().execute(step)
        super().execute(step).result()
        future: Future[ModelRunnerOutput] = Future()
        future.set_exception(OutOfDeviceMemoryError("no memory"))
        return future


def _requests(num: int) -> list[Request]:
    return [request(f"r{index}", seed=index, max_tokens=12) for index in range(num)]


@IN_FLIGHT
def test_a_poisonous_sequence_fails_alone(max_in_flight: int) -> None:
    inner = _Watched(400, 4, max_in_flight=max_in_flight)
    engine = EngineCore(FaultyExecutor(inner, parse_faults("sequence:4:raise")))
    requests = _requests(9)
    for one in requests:
        engine.add_request(one)
    outputs = drain(engine)
    ends = {one.request_id: outputs[one.request_id][-1] for one in requests}
    [poisonous] = [name for name, end in ends.items() if end.finish_reason is FinishReason.ERROR]
    assert ends[poisonous].error == "InjectedFaultError: a sequence was told to fail"
    for one in requests:
        if one.request_id != poisonous:
            assert tokens(outputs[one.request_id]) == run_alone(one, inner.spec)[0]
    assert {poisonous} in inner.steps
    # 12 steps without the fault; halving takes a few more, and neighbours are with it no more than needed.
    assert len(inner.steps) < 12 * 2 + 12
    assert engine.stats.kv_cache_usage == 0
    engine.shutdown()


@IN_FLIGHT
def test_others_go_on_beside_those_that_are_tried_again(max_in_flight: int) -> None:
    inner = _Watched(400, 4, max_in_flight=max_in_flight)
    engine = EngineCore(FaultyExecutor(inner, parse_faults("step:3:raise, step:5:raise")))
    requests = _requests(8)
    for one in requests[:4]:
        engine.add_request(one)
    for _ in range(3):
        engine.step()
    for one in requests[4:]:
        engine.add_request(one)
    outputs = drain(engine)
    for one in requests:
        found = [token for output in outputs.get(one.request_id, []) for token in output.token_ids]
        expected, _ = run_alone(one, inner.spec)
        assert found == expected[len(expected) - len(found) :]
        assert outputs[one.request_id][-1].finish_reason is FinishReason.LENGTH
    assert max(map(len, inner.steps[5:])) == 8  # together again
    engine.shutdown()


@IN_FLIGHT
def test_what_there_is_no_memory_for_runs_in_smaller_steps(max_in_flight: int) -> None:
    inner = _Watched(400, 4, max_in_flight=max_in_flight)
    inner.max_sequences = 3
    engine = EngineCore(inner)
    requests = _requests(12)
    for one in requests:
        engine.add_request(one)
    outputs = drain(engine)
    for one in requests:
        assert tokens(outputs[one.request_id]) == run_alone(one, inner.spec)[0]
    # What it has learnt holds for a while: few steps are too large.
    assert sum(len(step) > 3 for step in inner.steps) <= 4 * max_in_flight
    engine.shutdown()


def test_more_is_tried_once_there_may_be_memory_again() -> None:
    inner = _Watched(400, 4)
    engine = EngineCore(FaultyExecutor(inner, parse_faults("step:2:memory")))
    for index in range(8):
        engine.add_request(Request(f"r{index}", (index % 2, 1), SamplingParams(max_tokens=150)))
    drain(engine)
    assert max(map(len, inner.steps[3:60])) == 4
    assert max(map(len, inner.steps)) > 4
    engine.shutdown()


def test_a_sequence_whose_logits_are_no_numbers_fails_alone() -> None:
    inner = _Watched(400, 4)
    engine = EngineCore(FaultyExecutor(inner, parse_faults("sequence:4:nan")))
    requests = _requests(3)
    for one in requests:
        engine.add_request(one)
    outputs = drain(engine)
    assert (len(tokens(outputs["r0"])), outputs["r0"][-1].finish_reason) == (3, FinishReason.ERROR)
    for one in requests[1:]:
        assert tokens(outputs[one.request_id]) == run_alone(one, inner.spec)[0]
    assert len(inner.steps) == 13  # none is computed again
    engine.shutdown()


def test_a_lost_device_ends_the_engine() -> None:
    engine = EngineCore(FaultyExecutor(_Watched(400, 4), parse_faults("step:2:lost")))
    engine.add_request(request("a"))
    with pytest.raises(ExecutorLostError, match="step 2"):
        drain(engine)


def test_a_step_that_hangs_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("scheduler.faults.time.sleep", slept.append)
    engine = EngineCore(FaultyExecutor(_Watched(400, 4), parse_faults("step:2:sleep=2.5")))
    engine.add_request(request("a"))
    assert len(tokens(drain(engine)["a"])) == 9
    assert [seconds for seconds in slept if seconds] == [2.5]


def test_faults_are_read() -> None:
    assert parse_faults("") == ()
    assert parse_faults("step:1:raise, sequence:20:nan,step:3:sleep=0.5") == (
        Fault("step", 1, "raise"),
        Fault("sequence", 20, "nan"),
        Fault("step", 3, "sleep", 0.5),
    )
    for text in (
        "step",
        "step:0:raise",
        "step:1:nan",
        "sequence:1:lost",
        "step:1:sleep",
        "step:1:raise=2",
        "x:1:y",
    ):
        with pytest.raises(FaultsError, match="is no fault"):
            parse_faults(text)
