"""The GPU sampler with its kernels, in Triton's interpreter. Run by test_gpu_sampling.py."""

from __future__ import annotations

import numpy as np
import pytest

from engine_runtime.kernels.sampling_reference import sample_row
from engine_runtime.kernels.triton import embedding
from engine_runtime.sampling import Sampler
from scheduler.messages import SampledToken, SamplingParams
from tests.engine_runtime.kernels.interpreted_kernels import InterpretedLibrary
from tests.engine_runtime.kernels.interpreted_sampler import InterpretedSampler, use_host_memory
from tests.engine_runtime.kernels.sampling_cases import (
    assert_same_logprobs,
    cpu_sample,
    random_logits,
    random_params,
)


@pytest.fixture(autouse=True)
def _host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    use_host_memory(monkeypatch)


@pytest.mark.parametrize("vocab_size", [50, 300, 4096, 9001])
def test_draws_what_the_cpu_draws(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    sampler = InterpretedSampler(vocab_size)
    params = [random_params(rng, vocab_size) for _ in range(16)]
    logits = np.stack([random_logits(rng, vocab_size) for _ in params])
    positions = rng.integers(1, 100, len(params)).tolist()
    for slot, (param, position) in enumerate(zip(params, positions, strict=True)):
        sampler.admit(sampler.stream, slot, param, [0] * position, 1)
    sampled, _ = sampler.step(logits, range(16), positions)
    expected = [
        cpu_sample(row, param, [0] * position, 1)
        for row, param, position in zip(logits, params, positions, strict=True)
    ]
    assert [s.token_id for s in sampled] == [s.token_id for s in expected]
    assert sampler.sampled_tokens().tolist() == [s.token_id for s in expected]


def test_everything_at_once_over_steps_and_preemptions() -> None:
    vocab_size, num_rows = 700, 8
    rng = np.random.default_rng(5)
    sampler = InterpretedSampler(vocab_size)
    params = [random_params(rng, vocab_size, changes=True) for _ in range(num_rows)]
    tokens = [rng.integers(0, 40, 10).tolist() for _ in params]
    for slot, param in enumerate(params):
        sampler.admit(sampler.stream, slot, param, tokens[slot], 10)
    slots = list(range(num_rows))
    for step in range(7):
        if step == 3:  # two sequences come back from a preemption, in each other's slots
            slots[1], slots[4] = slots[4], slots[1]
            for row in (1, 4):
                sampler.admit(sampler.stream, slots[row], params[row], tokens[row], 10)
        logits = np.stack([random_logits(rng, vocab_size) for _ in params])
        logits[:, 40:] -= 10.0  # so that tokens repeat
        allowed = rng.random((num_rows, vocab_size)) < 0.6
        masks = np.packbits(allowed, axis=1, bitorder="little")
        masks = np.pad(masks, ((0, 0), (0, -masks.shape[1] % 4)))
        grammars = [masks[row].ctypes.data if row % 2 else 0 for row in range(num_rows)]
        sampled, _ = sampler.step(logits, slots, [len(ids) for ids in tokens], grammars=grammars)
        for row, ours in enumerate(sampled):
            expected = sample_row(
                logits[row],
                params[row],
                tokens[row],
                10,
                allowed[row] if row % 2 else None,
                f"r{slots[row]}",
            )
            assert (ours.token_id, ours.is_valid) == (expected.token_id, expected.is_valid)
            assert (ours.logprobs is None) == (expected.logprobs is None)
            if ours.logprobs is not None:
                assert_same_logprobs(ours, expected)
            tokens[row].append(ours.token_id)


def test_poisoned_rows_are_invalid_alone() -> None:
    vocab_size = 300
    rng = np.random.default_rng(0)
    for params in (
        SamplingParams(temperature=0.0),
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=5, logprobs=2, repetition_penalty=1.5),
    ):
        sampler = InterpretedSampler(vocab_size)
        for slot in range(5):
            sampler.admit(sampler.stream, slot, params, [1, 2], 2)
        logits = rng.standard_normal((5, vocab_size)).astype(np.float32)
        clean, _ = sampler.step(logits, range(5), [2] * 5)
        for slot in range(5):
            sampler.admit(sampler.stream, slot, params, [1, 2], 2)
        logits[0, 299], logits[2, 130], logits[4] = np.nan, np.inf, -np.inf
        sampled, _ = sampler.step(logits, range(5), [2] * 5)
        assert [s.is_valid for s in sampled] == [False, True, False, True, False]
        assert [sampled[row] for row in (1, 3)] == [clean[row] for row in (1, 3)]
        assert [sampled[row].logprobs for row in (0, 2, 4)] == [None] * 3


def test_a_row_does_not_depend_on_the_batch() -> None:
    vocab_size = 5000
    rng = np.random.default_rng(3)
    sampler = InterpretedSampler(vocab_size)
    params = SamplingParams(temperature=1.2, top_p=0.95, seed=9, logprobs=3)
    logits = rng.standard_normal((4, vocab_size)).astype(np.float32)
    for slot in range(4):
        sampler.admit(sampler.stream, slot, params, [1], 1)
    together, _ = sampler.step(logits, range(4), [1] * 4)
    for row in range(4):
        (alone,), _ = sampler.step(logits[row : row + 1].copy(), [row], [1])
        assert alone == together[row]


def test_given_tokens() -> None:
    vocab_size = 400
    rng = np.random.default_rng(4)
    sampler = InterpretedSampler(vocab_size)
    sampler.admit(sampler.stream, 0, SamplingParams(temperature=0.0), [1], 1)
    logits = rng.standard_normal((5, vocab_size)).astype(np.float32)
    logits[3, 17] = np.nan
    targets = [(7, 0), (399, 3), (17, 1)]
    sampled, given = sampler.step(logits, [0], [1], targets=targets, num_rows=5)
    assert sampled == [SampledToken("r0", int(logits[0].argmax()))]
    assert sampler.sampled_tokens().tolist() == [sampled[0].token_id] + [0] * 15
    cpu = Sampler(vocab_size)
    for row, ((token, top_n), ours) in enumerate(zip(targets, given, strict=True), start=1):
        (theirs,) = cpu.prompt_logprobs(logits[row : row + 1].copy(), [token], top_n)
        if row == 3:
            assert ours == theirs
        else:
            assert_same_logprobs(SampledToken("", token, ours), SampledToken("", token, theirs))


def test_embedding() -> None:
    rng = np.random.default_rng(6)
    size = embedding.BLOCK + 32
    table = rng.standard_normal((50, size)).astype(np.float16)
    token_ids = np.array([3, -1, 49, -4, 0], np.int32)
    sampled = np.array([11, 0, 0, 42], np.int32)
    hidden = np.full((5, size), np.nan, np.float16)
    arguments = [array.ctypes.data for array in (token_ids, sampled, table, hidden)]
    kernel = InterpretedLibrary(embedding.SPECS).get("embed_fp16")
    kernel.launch((5, 2, 1), None, *arguments, 1.5, 50, size)
    expected = (table[[3, 11, 49, 42, 0]].astype(np.float32) * 1.5).astype(np.float16)
    assert hidden.tobytes() == expected.tobytes()
