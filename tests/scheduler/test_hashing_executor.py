"""The fake notices what it is there to notice."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from scheduler.block_pool import BlockPool
from scheduler.engine_core import EngineCore
from scheduler.executor import Executor
from scheduler.hashing_executor import HashingExecutor, SchedulingError, run_alone, sample
from scheduler.messages import (
    ModelRunnerOutput,
    NewSequence,
    Request,
    SamplingParams,
    ScheduledSequence,
    SchedulerOutput,
)

PROMPT = (1, 0, 1, 1, 0, 0)


def new(
    name: str, token_ids: tuple[int, ...] = PROMPT, block_ids: tuple[int, ...] = (), **params: object
) -> NewSequence:
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return NewSequence(name, token_ids, len(token_ids), 4 * len(block_ids), block_ids, sampling)


def share(
    name: str, start: int, num_tokens: int, blocks: tuple[int, ...] = (), samples: bool = True
) -> ScheduledSequence:
    return ScheduledSequence(name, start, num_tokens, blocks, samples)


def run(
    executor: HashingExecutor,
    step_id: int,
    *scheduled: ScheduledSequence,
    new: tuple[NewSequence, ...] = (),
    released: tuple[str, ...] = (),
) -> ModelRunnerOutput:
    return executor.execute(SchedulerOutput(step_id, new, scheduled, released)).result()


def test_it_is_an_executor() -> None:
    executor: Executor = HashingExecutor(8, 4)
    assert executor.max_in_flight == 1
    assert executor.spec.num_blocks == 8
    future = executor.execute(SchedulerOutput(1, (new("a"),), (share("a", 0, 6, (3, 5)),), ()))
    assert isinstance(future, Future)
    executor.shutdown()


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_sequence_in_any_blocks_and_chunks_gets_the_same_tokens(max_in_flight: int) -> None:
    executor = HashingExecutor(8, 4, vocab_size=50, max_in_flight=max_in_flight)
    expected, _ = run_alone(Request("a", PROMPT, SamplingParams(max_tokens=2)), executor.spec)
    assert len(set(run_alone(Request("a", PROMPT, SamplingParams(max_tokens=99)), executor.spec)[0])) > 5
    first = run(executor, 1, share("a", 0, 6, (7, 2)), new=(new("a"),))
    assert [token.token_id for token in first.sampled] == expected[:1]
    steps = [
        share("b", 0, 3, (1,), samples=False),
        share("b", 3, 2, (6,), samples=False),
        share("b", 5, 1),
        share("b", 6, 1),
    ]
    results = [
        run(executor, 2 + index, one, new=(new("b"),) if index == 0 else ())
        for index, one in enumerate(steps)
    ]
    assert [token.token_id for result in results for token in result.sampled] == expected
    executor.shutdown()


def test_prefix_hits_are_read_from_the_shared_block() -> None:
    executor = HashingExecutor(8, 4)
    run(executor, 1, share("a", 0, 6, (7, 2)), new=(new("a"),))
    run(executor, 2, share("b", 4, 2, (0,)), new=(new("b", block_ids=(7,)),))
    with pytest.raises(SchedulingError, match="does not hold"):
        run(executor, 3, share("c", 4, 2, (4,)), new=(new("c", block_ids=(2,)),))


@pytest.mark.parametrize(
    ("message", "scheduled", "arrivals", "released"),
    [
        pytest.param(
            "does not hold", [share("b", 4, 2, (3,))], [new("b", block_ids=(5,))], (), id="empty block"
        ),
        pytest.param(
            "does not hold",
            [share("b", 0, 6, (5, 6)), share("c", 4, 2, (4,))],
            [new("b"), new("c", block_ids=(5,))],
            (),
            id="block filled in the same step",
        ),
        pytest.param(
            "does not hold",
            [share("a", 6, 1), share("b", 0, 6, (0, 1))],
            [new("b", token_ids=(0,) * 6)],
            (),
            id="block of somebody else",
        ),
        pytest.param("'a' is new but known", [share("a", 0, 6, (2, 3))], [new("a")], (), id="known"),
        pytest.param("'b' is released but not known", [share("a", 6, 1)], [], ("b",), id="not known"),
        pytest.param("7 tokens, 6 computed", [share("a", 5, 1)], [], (), id="computed again"),
        pytest.param("7 tokens, 6 computed", [share("a", 6, 2)], [], (), id="beyond the end"),
        pytest.param("of 7 tokens", [share("a", 6, 1, samples=False)], [], (), id="does not sample"),
        pytest.param("of 6 tokens", [share("b", 0, 3, (4,))], [new("b")], (), id="samples too early"),
        pytest.param("has 1 blocks", [share("b", 0, 6, (4,))], [new("b")], (), id="block missing"),
        pytest.param("has 3 blocks", [share("a", 6, 1, (4,))], [], (), id="block too many"),
        pytest.param("0 tokens in one step", [], [], (), id="empty step"),
        pytest.param(
            "13 tokens in one step",
            [share("a", 6, 1), share("b", 0, 12, (3, 4, 5))],
            [new("b", token_ids=(1,) * 12)],
            (),
            id="step too large",
        ),
        pytest.param(
            "4 sequences are alive",
            [share("a", 6, 1)],
            [new("b"), new("c"), new("d")],
            (),
            id="too many sequences",
        ),
        pytest.param(
            "prompt_logprobs",
            [share("b", 4, 2)],
            [new("b", block_ids=(0,), prompt_logprobs=1)],
            (),
            id="hits",
        ),
        pytest.param(
            "longer than", [share("b", 0, 10, (4, 5, 6))], [new("b", token_ids=(1,) * 10)], (), id="too long"
        ),
    ],
)
def test_mistakes_fail_the_step(
    message: str, scheduled: list[ScheduledSequence], arrivals: list[NewSequence], released: tuple[str, ...]
) -> None:
    executor = HashingExecutor(8, 4, max_num_seqs=3, max_num_batched_tokens=12, max_model_len=10)
    run(executor, 1, share("a", 0, 6, (0, 1)), new=(new("a"),))
    with pytest.raises(SchedulingError, match=message):
        run(executor, 2, *scheduled, new=tuple(arrivals), released=released)


def test_a_failed_step_destroys_what_it_was_to_write_and_nothing_else() -> None:
    executor = HashingExecutor(8, 4, fail_at_steps=(2,))
    run(executor, 1, share("a", 0, 6, (0, 1)), new=(new("a"),))
    with pytest.raises(RuntimeError, match="step 2 was told to fail"):
        run(executor, 2, share("b", 0, 6, (2, 3)), new=(new("b"),))
    run(executor, 3, share("c", 4, 2, (4,)), new=(new("c", block_ids=(0,)),))
    with pytest.raises(SchedulingError):
        run(executor, 4, share("d", 4, 2, (5,)), new=(new("d", block_ids=(2,)),))


def test_a_sequence_of_a_failed_step_has_no_valid_tokens_any_more() -> None:
    executor = HashingExecutor(8, 4, fail_at_steps=(2,))
    run(executor, 1, share("a", 0, 6, (0, 1)), new=(new("a"),))
    with pytest.raises(RuntimeError):
        run(executor, 2, share("a", 6, 1))
    assert [token.is_valid for token in run(executor, 3, share("a", 7, 1)).sampled] == [False]


def test_stop_tokens_are_masked_until_min_tokens() -> None:
    for prefix_hash in range(50):
        assert sample(prefix_hash, SamplingParams(min_tokens=3, stop_token_ids=(0, 2)), 2, 3) == 1
    assert {sample(h, SamplingParams(min_tokens=3, stop_token_ids=(0, 2)), 3, 3) for h in range(50)} == {
        0,
        1,
        2,
    }
    assert {sample(h, SamplingParams(min_tokens=3, stop_token_ids=(0, 1)), 0, 2) for h in range(50)} == {0, 1}


def test_seeds_matter() -> None:
    spec = HashingExecutor(99, 4, vocab_size=1000).spec
    requests = [Request("a", PROMPT, SamplingParams(seed=seed, max_tokens=5)) for seed in (1, 2)]
    assert run_alone(requests[0], spec) != run_alone(requests[1], spec)


def test_a_pool_that_gives_out_blocks_in_use_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(self: BlockPool, num_blocks: int, shared: object = (), num_spare: int = 0) -> list[int]:
        return list(range(num_blocks))

    monkeypatch.setattr(BlockPool, "allocate", allocate)
    monkeypatch.setattr(BlockPool, "release", lambda self, block_ids: None)
    engine = EngineCore(HashingExecutor(8, 4))
    for name, prompt in (("a", PROMPT), ("b", PROMPT[1:])):
        engine.add_request(Request(name, prompt))
    with pytest.raises(SchedulingError, match="slot 0"):
        engine.step()
