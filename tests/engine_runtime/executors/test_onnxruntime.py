"""The executor's promises: what is computed does not depend on how the scheduler cuts it into steps."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from engine_runtime.executors.onnxruntime.executor import OnnxRuntimeExecutor
from scheduler.executor import Executor
from scheduler.messages import (
    ModelRunnerOutput,
    NewSequence,
    SamplingParams,
    ScheduledSequence,
    SchedulerOutput,
)
from tests.engine_runtime.executors.generation import Limited, generate, tokens
from tests.scheduler.pattern_grammars import PatternGrammars, allowed

_RNG = np.random.default_rng(0)
_LENGTHS = (1, 2, 15, 16, 17, 40, 100, 257)
_PROMPTS = [_RNG.integers(3, 40000, length).tolist() for length in _LENGTHS]
_GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def alone(smollm2_int8: Executor) -> list[list[int]]:
    """Each prompt by itself, in one step; 12 tokens."""
    return [tokens(generate(smollm2_int8, [prompt], 12)[0])[0] for prompt in _PROMPTS]


def test_tokens_are_the_same_in_a_batch(smollm2_int8: Executor, alone: list[list[int]]) -> None:
    results, _ = generate(smollm2_int8, _PROMPTS, 12)
    assert tokens(results) == alone


def test_tokens_are_the_same_in_chunks(smollm2_int8: Executor, alone: list[list[int]]) -> None:
    results, stats = generate(Limited(smollm2_int8, max_num_batched_tokens=32), _PROMPTS, 12)
    assert stats.steps_total > 20
    assert tokens(results) == alone


@pytest.mark.usefixtures("frequent_preemptions")
def test_tokens_are_the_same_after_preemption(smollm2_int8: Executor) -> None:
    prompts = _PROMPTS[2:6]
    alone = [tokens(generate(smollm2_int8, [prompt], 40)[0])[0] for prompt in prompts]
    limited = Limited(smollm2_int8, num_blocks=8, max_model_len=100)  # all four would need 17
    results, stats = generate(limited, prompts, 40)
    assert stats.preemptions_total > 0
    assert tokens(results) == alone


def test_tokens_are_the_same_from_the_prefix_cache(smollm2_int8: Executor) -> None:
    shared = _PROMPTS[-1][:128]
    prompts = [shared + prompt for prompt in _PROMPTS[:4]]
    alone = [tokens(generate(smollm2_int8, [prompt], 8)[0])[0] for prompt in prompts]
    limited = Limited(
        smollm2_int8, max_num_seqs=1
    )  # one after the other, so that all but the first find blocks
    results, _ = generate(limited, prompts, 8)
    assert [result.num_cached_tokens for result in results] == [0, 128, 128, 128]
    assert tokens(results) == alone


def test_sampled_tokens_depend_on_the_seed_not_on_the_batch(smollm2_int8: Executor) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=11)
    together, _ = generate(smollm2_int8, _PROMPTS[:4], 10, params)
    alone = [tokens(generate(smollm2_int8, [prompt], 10, params)[0])[0] for prompt in _PROMPTS[:4]]
    assert tokens(together) == alone
    other, _ = generate(smollm2_int8, _PROMPTS[:4], 10, replace(params, seed=12))
    assert tokens(other) != alone


def test_forced_tokens_change_nothing(smollm2_int8: Executor) -> None:
    params = SamplingParams(temperature=0.9, seed=4)
    patterns = [".0.1..2." * 2, "0120...", None, "." * 16] * 2
    texts = []
    for forces in (False, True):
        grammars = PatternGrammars(forces=forces, vocab_size=smollm2_int8.spec.vocab_size)
        results, _ = generate(smollm2_int8, _PROMPTS, 12, params, grammars, patterns)
        texts.append(tokens(results))
    assert texts[0] == texts[1]
    for pattern, text in zip(patterns, texts[0], strict=True):
        if pattern is not None:
            assert all(token in allowed(pattern, text[:i]) for i, token in enumerate(text))
    free, _ = generate(smollm2_int8, _PROMPTS, 12, params)
    assert texts[0][2] == free[2].token_ids


def _logprobs(executor: Executor, prompts: list[list[int]]) -> list[list[tuple[float, int]]]:
    params = SamplingParams(temperature=0.0, logprobs=2)
    results, _ = generate(executor, prompts, 3, params)
    return [[(record.logprob, record.rank) for record in result.logprobs] for result in results]


def test_logprobs_are_bitwise_the_same_in_any_batch(smollm2_int8: Executor) -> None:
    together = _logprobs(smollm2_int8, _PROMPTS)
    chunked = _logprobs(Limited(smollm2_int8, max_num_batched_tokens=24), _PROMPTS)
    alone = [_logprobs(smollm2_int8, [prompt])[0] for prompt in _PROMPTS]
    assert together == alone
    assert chunked == alone


def test_prompt_logprobs_match_those_of_generation(smollm2_int8: Executor) -> None:
    """The prompt extended by its own greedy continuation must find that continuation as likely as before."""
    prompt = _PROMPTS[6]
    (first,), _ = generate(smollm2_int8, [prompt], 6, replace(_GREEDY, logprobs=1))
    params = replace(_GREEDY, prompt_logprobs=1)
    whole = prompt + first.token_ids
    for executor in (smollm2_int8, Limited(smollm2_int8, max_num_batched_tokens=32)):
        (second, other), _ = generate(executor, [whole, _PROMPTS[4]], 1, params)
        assert second.prompt_logprobs is not None
        assert len(second.prompt_logprobs) == len(whole) - 1
        assert [record.token_id for record in second.prompt_logprobs] == whole[1:]
        assert second.prompt_logprobs[-6:] == tuple(first.logprobs)
        assert other.prompt_logprobs is not None
        assert len(other.prompt_logprobs) == len(_PROMPTS[4]) - 1
        assert all(record.logprob < 0 and record.rank >= 1 for record in other.prompt_logprobs)


def test_int8_and_float32_agree_where_the_model_is_sure(
    smollm2_int8: Executor, smollm2_float32: Executor
) -> None:
    params = SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=0)
    ours, _ = generate(smollm2_int8, _PROMPTS[4:], 1, params)
    exact, _ = generate(smollm2_float32, _PROMPTS[4:], 1, params)
    a = [r.logprob for result in ours for r in result.prompt_logprobs or ()]
    b = [r.logprob for result in exact for r in result.prompt_logprobs or ()]
    # Random tokens: 12 nats each. Perplexity on real text is measured by tests/benchmarks/perplexity.
    assert math.isclose(np.mean(a), np.mean(b), rel_tol=0.02)
    assert np.corrcoef(a, b)[0, 1] > 0.97


def _prompt_step(name: str, prompt: list[int], blocks: tuple[int, ...]) -> SchedulerOutput:
    new = NewSequence(name, tuple(prompt), len(prompt), 0, (), _GREEDY)
    return SchedulerOutput(1, (new,), (ScheduledSequence(name, 0, len(prompt), blocks, True),), ())


def test_a_failed_step_leaves_the_executor_usable(smollm2_int8: Executor) -> None:
    good = smollm2_int8.execute(_prompt_step("a", _PROMPTS[2], (0,))).result().sampled[0].token_id
    missing: Future[ModelRunnerOutput] = smollm2_int8.execute(
        SchedulerOutput(2, (), (ScheduledSequence("never seen", 0, 1, (), True),), ())
    )
    with pytest.raises(KeyError):
        missing.result()
    too_long = [1] * (smollm2_int8.spec.max_num_batched_tokens + 1)
    with pytest.raises(ValueError, match="could not broadcast"):
        smollm2_int8.execute(_prompt_step("b", too_long, tuple(range(65)))).result()
    again = smollm2_int8.execute(_prompt_step("a", _PROMPTS[2], (0,))).result()
    assert [token.token_id for token in again.sampled] == [good]


def test_steps_without_samples_and_without_tokens(smollm2_int8: Executor) -> None:
    new = NewSequence("a", tuple(_PROMPTS[5]), 40, 0, (), _GREEDY)
    chunk = SchedulerOutput(5, (new,), (ScheduledSequence("a", 0, 16, (3,), False),), ())
    assert smollm2_int8.execute(chunk).result() == ModelRunnerOutput(5, ())
    assert smollm2_int8.execute(SchedulerOutput(6, (), (), ("a",))).result() == ModelRunnerOutput(6, ())


def test_logits_that_are_not_finite_fail_their_own_sequence(smollm2_int8: Executor) -> None:
    assert isinstance(smollm2_int8, OnnxRuntimeExecutor)
    step = SchedulerOutput(
        1,
        tuple(NewSequence(name, (token,), 1, 0, (), _GREEDY) for name, token in (("a", 5), ("b", 6))),
        tuple(ScheduledSequence(name, 0, 1, (block,), True) for name, block in (("a", 0), ("b", 1))),
        (),
    )
    scales = smollm2_int8._embedding._scales
    assert scales is not None
    kept = scales[6].copy()
    scales[6] = np.nan
    try:
        broken = smollm2_int8.execute(step).result()
    finally:
        scales[6] = kept
    assert [token.is_valid for token in broken.sampled] == [True, False]
    healed = smollm2_int8.execute(step).result()
    assert [token.is_valid for token in healed.sampled] == [True, True]
    assert healed.sampled[0] == broken.sampled[0]


def test_threads_sleep_between_steps(smollm2_int8: Executor) -> None:
    smollm2_int8.execute(_prompt_step("a", _PROMPTS[6], tuple(range(7)))).result()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05  # a spinning thread would have used 0.5


def test_spec(smollm2_int8: Executor) -> None:
    spec = smollm2_int8.spec
    assert smollm2_int8.max_in_flight == 1
    assert (spec.vocab_size, spec.block_size, spec.max_model_len) == (49152, 16, 2048)
    assert "int8" in spec.device
    assert spec.model_id.endswith("-int8")
