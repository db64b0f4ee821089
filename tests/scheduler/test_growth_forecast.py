"""Memory that those who run are expected to need: against a simulation, and what it is good for."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest

from scheduler.engine_core import EngineCore
from scheduler.growth_forecast import GrowthForecast
from scheduler.hashing_executor import HashingExecutor, run_alone
from scheduler.messages import FinishReason, Request, SamplingParams
from scheduler.sequence import Sequence
from tests.scheduler.test_workloads import check_exact, heavy_workload, run

BLOCK = 4
CAUTION = 3  # blocks, when 12 run whose ends are known


def _sequence(
    num_prompt: int, num_generated: int, max_tokens: int, num_blocks: int, stop: tuple[int, ...] = ()
) -> Sequence:
    request = Request(
        "r",
        (1,) * num_prompt,
        SamplingParams(max_tokens=max_tokens, stop_token_ids=stop),
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
        forecast.ended(_sequence(1, length, 10_000, 0, stop=(3,)))
    return forecast


def test_the_peak_is_that_of_a_simulation() -> None:
    dice = random.Random(3)
    forecast = _forecast(*[2] * 64)  # which says nothing about answers that cannot stop
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
        # Each may need a block more than the forecast's sum of tokens, or one less, and there is the caution.
        peak = forecast.peak(everybody, own)
        assert most - len(everybody) <= peak <= max(0, most) + len(everybody) + CAUTION


def test_what_is_expected_is_what_became_of_those_that_got_as_long() -> None:
    forecast = _forecast(*[12] * 32, *[100] * 32)

    def growth(count: int, num_generated: int, max_tokens: int = 10_000) -> int:
        num_blocks = _blocks(8 + num_generated)
        return forecast.peak([_sequence(8, num_generated, max_tokens, num_blocks, (3,))] * count, 0)

    # A half of them is going to have 27 blocks, where all have 2. Chance counts for less, the more they are.
    assert 16 * (27 / 2 - 2) < growth(16, 0) < 16 * (27 * 0.9 - 2)
    assert 400 * (27 / 2 - 2) < growth(400, 0) < 400 * (27 * 0.6 - 2)
    assert 16 * (15 - 1) <= growth(16, 40) <= 16 * (15 + 1)  # all of them are going to
    assert 16 * 1 <= growth(16, 40, max_tokens=44) <= 16 * (1 + 1)  # but not more than they may
    assert growth(1, 200) > 10  # longer than any: nobody knows


@dataclass
class _Outcome:
    num_steps: int
    num_preemptions: int
    share_computed_again: float


def _run(num_blocks: int, lengths: Iterable[int], *, is_known: bool) -> _Outcome:
    """Answers that are longer than their prompts, always more of them than fit.

    Args:
        is_known: they are as long as they may be. Otherwise they stop by themselves long before.
    """
    dice = random.Random(1)
    executor = HashingExecutor(
        num_blocks=num_blocks,
        block_size=BLOCK,
        vocab_size=1 << 40,
        max_num_seqs=32,
        max_num_batched_tokens=64,
    )
    core = EngineCore(executor)
    pending = []
    for number, length in enumerate(lengths):
        prompt = tuple(dice.randrange(100) for _ in range(dice.randint(4, 12)))
        request = Request(f"r{number}", prompt, SamplingParams(max_tokens=length))
        if not is_known:
            answer, _ = run_alone(request, executor.spec)
            request = replace(request, params=SamplingParams(max_tokens=80, stop_token_ids=(answer[-1],)))
        pending.append(request)
    num_steps = 0
    while pending or core.has_work:
        while pending and core.stats.num_waiting < 4:
            core.add_request(pending.pop(0))
            core.step()
            num_steps += 1
        core.step()
        num_steps += 1
    core.check_invariants()
    stats = core.stats
    return _Outcome(
        num_steps, stats.preemptions_total, stats.recomputed_tokens_total / stats.scheduled_tokens_total
    )


def test_hardly_anything_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(2)
    lengths = [dice.randint(20, 40) for _ in range(240)]
    known = _run(90, lengths, is_known=True)
    with_forecast = _run(90, lengths, is_known=False)
    monkeypatch.setattr(GrowthForecast, "is_needed", lambda *arguments: False)
    without = _run(90, lengths, is_known=False)
    assert with_forecast.share_computed_again < 0.01
    assert with_forecast.num_preemptions <= 2
    assert without.share_computed_again > 0.05
    assert with_forecast.num_steps < 1.6 * without.num_steps  # there is room for 8: few for a mean
    assert known.num_preemptions == 0
    assert known.num_steps < 1.2 * without.num_steps


def test_who_gets_all_that_it_may_is_never_preempted_whatever_came_before() -> None:
    dice = random.Random(4)
    short, long = ([dice.randint(low, 2 * low) for _ in range(60)] for low in (3, 20))
    assert _run(90, short + long, is_known=True).num_preemptions == 0


def test_of_short_and_long_answers_the_long_ones_are_reckoned_with() -> None:
    dice = random.Random(5)
    outcome = _run(90, [dice.choice((4, 60)) for _ in range(120)], is_known=False)
    assert outcome.num_preemptions <= 2
    assert outcome.share_computed_again < 0.01


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
