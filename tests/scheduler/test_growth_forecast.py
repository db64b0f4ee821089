"""Memory that those who run are expected to need: against a simulation, and what it is good for."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from scheduler.engine_core import EngineCore
from scheduler.growth_forecast import GrowthForecast
from scheduler.hashing_executor import HashingExecutor
from scheduler.messages import FinishReason, Request, SamplingParams
from scheduler.sequence import Sequence
from tests.scheduler.test_workloads import check_exact, heavy_workload, run

BLOCK = 4


def _sequence(num_prompt: int, num_generated: int, max_tokens: int, num_blocks: int) -> Sequence:
    request = Request(
        "r",
        (1,) * num_prompt,
        SamplingParams(max_tokens=max_tokens),
        generated_token_ids=(2,) * num_generated,
    )
    sequence = Sequence(request, 1, 10_000)
    sequence.block_ids = list(range(num_blocks))
    sequence.is_running = num_blocks > 0
    return sequence


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK)


def _forecast(*lengths: int) -> GrowthForecast:
    forecast = GrowthForecast(BLOCK)
    for length in lengths:
        forecast.ended(_sequence(1, length, 10_000, 0))
    return forecast


def test_the_peak_is_that_of_a_simulation() -> None:
    dice = random.Random(3)
    # All earlier answers were longer than these may get, so that it is known when each ends.
    forecast = _forecast(*[5000] * 64)
    for _ in range(300):
        sequences = []
        for _ in range(dice.randint(1, 12)):
            prompt, generated = dice.randint(1, 40), dice.randint(0, 30)
            held = _blocks(dice.randint(1, prompt + generated))  # it may still be computing its prompt
            sequences.append(_sequence(prompt, generated, generated + dice.randint(1, 60), held))
        newcomer = _sequence(dice.randint(1, 40), 0, dice.randint(1, 60), 0)
        own = _blocks(newcomer.num_prompt_tokens)
        everybody = [*sequences, newcomer]
        held_now = sum(len(sequence.block_ids) for sequence in sequences) + own
        most = max(
            sum(
                _blocks(len(s.token_ids) + steps)
                for s in everybody
                if len(s.token_ids) + steps <= s.max_num_tokens
            )
            - held_now
            for steps in range(70)
        )
        # Each may need a block more than the forecast's sum of tokens, or one less.
        assert most - len(everybody) <= forecast.peak(everybody, own) <= max(0, most) + len(everybody)


def test_what_is_expected_is_what_became_of_those_that_got_as_long() -> None:
    forecast = _forecast(*[10] * 32, *[100] * 32)
    young, old, oldest = (_sequence(8, n, 10_000, 2 + n // 4) for n in (0, 40, 200))
    assert forecast.peak([young], 0) == 100 // BLOCK
    assert forecast.peak([old], 0) == 60 // BLOCK
    assert forecast.peak([oldest], 0) == 1  # longer than any: a block at a time
    assert forecast.peak([_sequence(8, 40, 44, 12)], 0) == 1  # it may not have more


@dataclass
class _Outcome:
    num_steps: int
    share_computed_again: float


def _run(num_blocks: int) -> _Outcome:
    """Answers that are much longer than their prompts, always more of them than fit."""
    dice = random.Random(1)
    executor = HashingExecutor(
        num_blocks=num_blocks, block_size=BLOCK, vocab_size=100, max_num_seqs=32, max_num_batched_tokens=64
    )
    core = EngineCore(executor)
    num_ended = num_sent = num_steps = 0
    while num_ended < 120:
        while num_sent - num_ended < 36:
            prompt = tuple(dice.randrange(100) for _ in range(dice.randint(4, 12)))
            core.add_request(Request(f"r{num_sent}", prompt, SamplingParams(max_tokens=dice.randint(20, 40))))
            num_sent += 1
        num_ended += sum(output.finish_reason is not None for output in core.step().outputs)
        num_steps += 1
    core.check_invariants()
    stats = core.stats
    return _Outcome(num_steps, stats.recomputed_tokens_total / stats.scheduled_tokens_total)


def test_hardly_anything_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with_forecast = _run(90)
    monkeypatch.setattr(GrowthForecast, "is_needed", lambda *arguments: False)
    without = _run(90)
    assert with_forecast.share_computed_again < 0.02
    assert without.share_computed_again > 0.05
    assert with_forecast.num_steps < 1.2 * without.num_steps


@pytest.mark.parametrize("seed", range(12))
def test_everybody_gets_on_whatever_is_expected(seed: int) -> None:
    workload = heavy_workload(seed)
    outcomes, executor, _ = run(workload)
    for request in workload.requests:
        check_exact(request, outcomes[request.request_id], executor.spec)


def test_who_is_alone_is_let_in_though_its_answer_may_not_fit() -> None:
    executor = HashingExecutor(
        num_blocks=8, block_size=BLOCK, vocab_size=100, max_num_seqs=2, max_num_batched_tokens=64
    )
    core = EngineCore(executor)
    for name in "ab":
        core.add_request(Request(name, (1,) * 20, SamplingParams(max_tokens=1000)))
    ends = []
    for _ in range(100):
        ends += [o for o in core.step().outputs if o.finish_reason is not None]
    assert [(end.request_id, end.finish_reason) for end in ends] == [
        ("a", FinishReason.LENGTH),
        ("b", FinishReason.LENGTH),
    ]
    assert core.stats.preemptions_total == 0
