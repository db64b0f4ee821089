"""The GPU sampler, kernels included, on a CPU. tests/gpu/test_sampling.py repeats this at full size on a GPU.

Triton decides when it is imported whether it interprets, so the tests of the kernels run in a process of
their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from engine_runtime import sampling as cpu_sampling
from engine_runtime.kernels import sampling_layout as layout
from engine_runtime.kernels.sampling_reference import sample_row
from engine_runtime.kernels.sampling_rows import (
    GREEDY_TEMPERATURE,
    SamplingPath,
    SamplingRows,
    changed_logits,
    random_state,
    split,
    token_counts,
    uniforms,
)
from engine_runtime.sampling import Sampler, SamplingRow
from scheduler.messages import SampledToken, SamplingParams
from tests.engine_runtime.kernels.sampling_cases import random_logits, random_params

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
in_the_interpreter = pytest.mark.skipif(not INTERPRETS, reason="runs in a process of its own, see below")


@pytest.mark.skipif(INTERPRETS, reason="is the process that it would start")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "TestInterpreted"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def cpu_sample(
    logits: npt.NDArray[np.float32], params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int
) -> SampledToken:
    row = SamplingRow("r", params, np.array(token_ids, np.int32), num_prompt_tokens)
    return Sampler(len(logits)).sample(logits[None].copy(), [row])[0]


class TestReference:
    """The numpy reference, which is what the GPU is compared with, against the CPU's sampler."""

    @pytest.mark.parametrize("vocab_size", [3, 300, 5001])
    def test_agrees_with_the_cpu_sampler(self, vocab_size: int) -> None:
        rng = np.random.default_rng(vocab_size)
        cases = 150
        agreed = 0
        for _ in range(cases):
            params = random_params(rng, vocab_size, changes=True)
            logits = random_logits(rng, vocab_size)
            token_ids = rng.integers(0, vocab_size, 12).tolist()
            ours = sample_row(logits, params, token_ids, 8, request_id="r")
            theirs = cpu_sample(logits, params, token_ids, 8)
            agreed += ours.token_id == theirs.token_id
            assert ours.is_valid == theirs.is_valid
            if ours.token_id == theirs.token_id and ours.logprobs and theirs.logprobs:
                assert_same_logprobs(ours, theirs)
        assert agreed >= cases - 1

    def test_poisoned_logits_are_not_valid(self) -> None:
        for poison in (np.nan, np.inf):
            logits = np.zeros(10, np.float32)
            logits[3] = poison
            assert not sample_row(logits, SamplingParams(), [1], 1).is_valid
        assert not sample_row(np.full(10, -np.inf, np.float32), SamplingParams(), [1], 1).is_valid


def assert_same_logprobs(ours: SampledToken, theirs: SampledToken) -> None:
    assert ours.logprobs is not None
    assert theirs.logprobs is not None
    assert ours.logprobs.rank == theirs.logprobs.rank
    assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=2e-5, rel=1e-6)
    assert [token for token, _ in ours.logprobs.top] == [token for token, _ in theirs.logprobs.top]
    np.testing.assert_allclose(
        [value for _, value in ours.logprobs.top],
        [value for _, value in theirs.logprobs.top],
        atol=2e-5,
        rtol=1e-6,
    )


class TestRows:
    def test_random_numbers_are_those_of_the_cpu(self) -> None:
        assert GREEDY_TEMPERATURE == cpu_sampling.GREEDY_TEMPERATURE
        for seed in (0, 1, -1, 2**63, 2**64 - 1, 12345):
            positions = np.array([0, 1, 77, 2**31, 2**40])
            states = np.array([random_state(seed)] * len(positions))
            expected = [cpu_sampling.uniform(seed, int(position)) for position in positions]
            assert uniforms(states, positions).tolist() == expected

    def test_counts(self) -> None:
        counts = token_counts([1, 1, 3, 3, 4, 3, -1, 99], 3, 5)
        assert counts.tolist() == [0, layout.PROMPT_BIT, 0, layout.PROMPT_BIT + 2, 1]
        many = token_counts([0] * 40_000, 0, 2)
        assert many.tolist() == [layout.COUNT_BITS, 0]

    def test_changes_are_sorted_and_summed_and_forbidding_wins(self) -> None:
        params = SamplingParams(logit_bias=((7, 1.5), (2, -3.0), (7, 1.0), (50, 1.0)), stop_token_ids=(2, 60))
        changes = changed_logits(params, 50, forbids_stop=False)
        assert changes.token_ids.tolist() == [2, 7]
        assert changes.values.tolist() == [-3.0, 2.5]
        changes = changed_logits(params, 50, forbids_stop=True)
        assert changes.token_ids.tolist() == [2, 7]
        assert changes.values.tolist() == [-np.inf, 2.5]

    def test_too_many_changes_and_logprobs_are_refused(self) -> None:
        params = SamplingParams(logit_bias=tuple((i, 1.0) for i in range(layout.MAX_CHANGES + 1)))
        with pytest.raises(ValueError, match="1025 tokens"):
            changed_logits(params, 5000, forbids_stop=False)
        with pytest.raises(ValueError, match="21"):
            SamplingRows(100, 1).set(0, SamplingParams(logprobs=21), 1)

    def test_paths(self) -> None:
        rows = SamplingRows(100, 4)
        memory = np.empty(16 * layout.BYTES_PER_ROW, np.uint8)
        rows.set(0, SamplingParams(temperature=0.0, top_p=0.5), 1)
        rows.set(1, SamplingParams(top_k=3), 1)
        rows.set(2, SamplingParams(logprobs=0), 1)
        assert rows.pack(memory, 16, [0], [1]).path is SamplingPath.GREEDY
        assert rows.pack(memory, 16, [0, 1], [1, 1]).path is SamplingPath.DRAWN
        assert rows.pack(memory, 16, [0, 1, 2], [1, 1, 1]).path is SamplingPath.FULL
        assert rows.pack(memory, 16, [0], [1], grammars=[4096]).path is SamplingPath.FULL
        assert rows.pack(memory, 16, [0], [1], targets=[(5, 2)]).top_ns == (None, 2)

    def test_stop_tokens_are_forbidden_below_min_tokens_only(self) -> None:
        rows = SamplingRows(100, 4)
        memory = np.empty(16 * layout.BYTES_PER_ROW, np.uint8)
        params = SamplingParams(min_tokens=2, stop_token_ids=(5,))
        rows.set(3, params, 10, changes_address=1 << 20, num_changes=(0, 1))
        for position, number, offset in (
            (10, 1, layout.CHANGES_BYTES),
            (11, 1, layout.CHANGES_BYTES),
            (12, 0, 0),
        ):
            packed = rows.pack(memory, 16, [3], [position])
            _, addresses, words = split(memory, 16)
            assert words[0, layout.NUM_CHANGES] == number
            assert bool(words[0, layout.FLAGS] & layout.HAS_CHANGES) == bool(number)
            assert addresses[0, layout.CHANGES] == (1 << 20) + offset
            assert packed.path is (SamplingPath.FULL if number else SamplingPath.DRAWN)

    def test_left_over_rows_belong_to_nobody(self) -> None:
        rows = SamplingRows(100, 4)
        memory = np.full(16 * layout.BYTES_PER_ROW, 0xFF, np.uint8)
        rows.set(0, SamplingParams(temperature=0.0), 1)
        assert rows.pack(memory, 16, [0], [1], num_rows=8).num_rows == 8
        _, _, words = split(memory, 16)
        assert words[1:8, layout.FLAGS].tolist() == [0] * 7
        assert words[1:8, layout.SLOT].tolist() == [-1] * 7
        with pytest.raises(ValueError, match="17 rows"):
            rows.pack(memory, 16, [0] * 17, [1] * 17)


@in_the_interpreter
class TestInterpreted:
    @pytest.fixture(autouse=True)
    def _host_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tests.engine_runtime.kernels.interpreted_sampler import use_host_memory

        use_host_memory(monkeypatch)

    @pytest.mark.parametrize("vocab_size", [50, 300, 4096, 9001])
    def test_draws_what_the_cpu_draws(self, vocab_size: int) -> None:
        from tests.engine_runtime.kernels.interpreted_sampler import InterpretedSampler

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

    def test_everything_at_once_over_steps_and_preemptions(self) -> None:
        from tests.engine_runtime.kernels.interpreted_sampler import InterpretedSampler

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

    def test_poisoned_rows_are_invalid_alone(self) -> None:
        from tests.engine_runtime.kernels.interpreted_sampler import InterpretedSampler

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

    def test_a_row_does_not_depend_on_the_batch(self) -> None:
        from tests.engine_runtime.kernels.interpreted_sampler import InterpretedSampler

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

    def test_given_tokens(self) -> None:
        from tests.engine_runtime.kernels.interpreted_sampler import InterpretedSampler

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

    def test_embedding(self) -> None:
        from tests.engine_runtime.kernels.interpreted_sampler import InterpretedKernels

        rng = np.random.default_rng(6)
        table = rng.standard_normal((50, 96)).astype(np.float16)
        token_ids = np.array([3, -1, 49, -4, 0], np.int32)
        sampled = np.array([11, 0, 0, 42], np.int32)
        hidden = np.full((5, 96), np.nan, np.float16)
        arguments = [array.ctypes.data for array in (token_ids, sampled, table, hidden)]
        kernel = InterpretedKernels().get("embed_fp16")
        kernel.launch((5, 2, 1), 0, *arguments, 1.5, 50, 96)
        expected = (table[[3, 11, 49, 42, 0]].astype(np.float32) * 1.5).astype(np.float16)
        assert hidden.tobytes() == expected.tobytes()
