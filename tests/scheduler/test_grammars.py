"""Sequences that follow a grammar, through the whole step loop."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from scheduler.engine_core import EngineCore
from scheduler.hashing_executor import HashingExecutor, run_alone
from scheduler.messages import Accepted, EngineOutput, FinishReason, Request, SamplingParams
from tests.scheduler.pattern_grammars import END, VOCAB_SIZE, PatternGrammars, follow_alone

IN_FLIGHT = pytest.mark.parametrize("max_in_flight", [1, 2])


def engine(grammars: PatternGrammars | None, max_in_flight: int = 1, **limits: int) -> EngineCore:
    executor = HashingExecutor(
        **{"num_blocks": 64, "block_size": 4, "vocab_size": VOCAB_SIZE, **limits}, max_in_flight=max_in_flight
    )
    return EngineCore(executor, grammars)


def request(name: str, grammar: str | None, *, generated: tuple[int, ...] = (), **params: object) -> Request:
    start = sum(map(ord, name))
    return Request(
        name,
        tuple((start + position * 5) % 3 for position in range(1 + start % 7)),
        SamplingParams(**{"max_tokens": 30, **params}),  # type: ignore[arg-type]
        grammar=grammar,
        generated_token_ids=generated,
    )


def drain(core: EngineCore) -> dict[str, list[EngineOutput]]:
    outputs: dict[str, list[EngineOutput]] = {}
    while core.has_work:
        for output in core.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
        core.check_invariants()
    return outputs


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


@IN_FLIGHT
@pytest.mark.parametrize("forces", [False, True])
def test_random_workloads_are_token_exact(max_in_flight: int, forces: bool) -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        requests = [
            Request(
                f"r{index}",
                tuple(rng.randrange(3) for _ in range(rng.randrange(1, 20))),
                SamplingParams(seed=rng.randrange(3), max_tokens=rng.choice([1, 5, 12, 40])),
                priority=rng.choice([0, 0, 1]),
                grammar="".join(rng.choice("012...") for _ in range(rng.randrange(25)))
                if rng.random() < 0.7
                else None,
            )
            for index in range(12)
        ]
        grammars = PatternGrammars(forces=forces)
        core = engine(
            grammars,
            max_in_flight,
            num_blocks=rng.choice([16, 30]),
            max_num_seqs=rng.choice([3, 8]),
            max_num_batched_tokens=rng.choice([4, 32]),
            max_model_len=40,
        )
        outputs: dict[str, list[EngineOutput]] = {}
        for one in requests:
            core.add_request(one)
            for _ in range(rng.randrange(3)):
                for output in core.step().outputs:
                    outputs.setdefault(output.request_id, []).append(output)
        for name, rest in drain(core).items():
            outputs.setdefault(name, []).extend(rest)
        for one in requests:
            expected = run_alone(one, core._executor.spec) if one.grammar is None else follow_alone(one, 40)
            found = outputs[one.request_id]
            assert (tokens(found), found[-1].finish_reason) == expected, (seed, one)
            seen[str(found[-1].finish_reason)] += one.grammar is not None
            seen["several at once"] += any(len(output.token_ids) > 1 for output in found)
        seen["preemptions"] += core.stats.preemptions_total
        assert not grammars.followed
        core.shutdown()
    assert seen["stop"] > 100
    assert seen["length"] > 100
    assert seen["preemptions"] > 20
    assert (seen["several at once"] > 100) == forces


def test_forced_tokens_cost_no_step() -> None:
    core = engine(PatternGrammars(forces=True))
    core.add_request(request("a", ".0120.1"))
    outputs = drain(core)["a"]
    assert [len(output.token_ids) for output in outputs] == [5, 3]
    assert core.stats.steps_total == 2
    assert tokens(outputs)[-1] == END


def test_forced_tokens_stop_at_the_limit() -> None:
    core = engine(PatternGrammars(forces=True))
    core.add_request(request("a", ".0120", max_tokens=3))
    outputs = drain(core)["a"]
    assert [len(output.token_ids) for output in outputs] == [3]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_stop_token_among_the_forced_ones_ends_the_text() -> None:
    core = engine(PatternGrammars(forces=True))
    core.add_request(request("a", "02110", stop_token_ids=(1,)))
    outputs = drain(core)["a"]
    assert tokens(outputs) == [0, 2, 1]
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_the_end_of_a_grammar_ends_the_text_whatever_min_tokens_says() -> None:
    core = engine(PatternGrammars(forces=True))
    core.add_request(request("a", "..", min_tokens=20, stop_token_ids=(END,)))
    outputs = drain(core)["a"]
    assert len(tokens(outputs)) == 3
    assert outputs[-1].finish_reason is FinishReason.STOP


@IN_FLIGHT
def test_a_grammar_goes_on_behind_what_an_engine_generated_before_it_died(max_in_flight: int) -> None:
    whole = request("a", "0.1.2.0.")
    expected, _ = follow_alone(whole, 1024)
    for cut in range(len(expected)):
        core = engine(PatternGrammars(forces=True), max_in_flight)
        core.add_request(request("a", whole.grammar, generated=tuple(expected[:cut])))
        assert tokens(drain(core)["a"]) == expected[cut:]
        core.shutdown()


@IN_FLIGHT
def test_nobody_waits_for_a_grammar_that_is_being_compiled(max_in_flight: int) -> None:
    grammars = PatternGrammars(forces=False, is_slow=True)
    core = engine(grammars, max_in_flight)
    core.add_request(request("slow", "012"))
    assert not core.has_work
    core.add_request(request("free", None, max_tokens=5))
    assert set(drain(core)) == {"free"}
    grammars.finish()
    assert core.has_work
    assert tokens(drain(core)["slow"]) == [0, 1, 2, END]
    core.shutdown()


def test_a_request_can_be_aborted_while_its_grammar_is_compiled() -> None:
    grammars = PatternGrammars(forces=False, is_slow=True)
    core = engine(grammars)
    core.add_request(request("a", "012"))
    core.abort("a")
    (output,) = drain(core)["a"]
    assert output.finish_reason is FinishReason.ABORT
    grammars.finish()
    assert not core.has_work


def test_a_wrong_grammar_ends_its_request_only() -> None:
    core = engine(PatternGrammars(forces=False))
    core.add_request(request("wrong", "01x"))
    core.add_request(request("right", "01"))
    outputs = drain(core)
    assert outputs["wrong"][0].finish_reason is FinishReason.ERROR
    assert "01x" in (outputs["wrong"][0].error or "")
    assert tokens(outputs["right"]) == [0, 1, END]


@IN_FLIGHT
def test_a_grammar_that_cannot_go_on_ends_its_request_only(max_in_flight: int) -> None:
    class Failing(PatternGrammars):
        def accept(self, request_id: str, token_id: int) -> Accepted:
            accepted = super().accept(request_id, token_id)
            is_third = len(self.followed[request_id][1]) == 3
            return Accepted(error="too complex") if is_third and request_id == "a" else accepted

    core = engine(Failing(forces=False), max_in_flight)
    core.add_request(request("a", "......"))
    core.add_request(request("b", "......"))
    outputs = drain(core)
    assert len(tokens(outputs["a"])) == 2
    assert outputs["a"][-1].finish_reason is FinishReason.ERROR
    assert outputs["a"][-1].error == "too complex"
    assert outputs["b"][-1].finish_reason is FinishReason.STOP
    core.shutdown()


def test_an_engine_without_grammars_says_so() -> None:
    core = engine(None)
    core.add_request(request("a", "012"))
    (output,) = drain(core)["a"]
    assert output.finish_reason is FinishReason.ERROR
    assert "grammars" in (output.error or "")
