"""The GPU sampler, kernels included, on a CPU. tests/gpu/test_sampling.py repeats this at full size on a GPU.

Triton decides when it is imported whether it interprets, so the tests of the kernels run in a process of
their own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
from scheduler.messages import SamplingParams
from tests.engine_runtime.kernels.interpreter_process import check_interpreted, starts_the_interpreter
from tests.engine_runtime.kernels.sampling_cases import (
    assert_same_logprobs,
    cpu_sample,
    random_logits,
    random_params,
)

CHECKS = Path(__file__).with_name("interpreted_sampler_checks.py")


@starts_the_interpreter
def test_kernels_in_the_interpreter() -> None:
    check_interpreted(CHECKS)


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

    def test_a_grammar_says_by_itself_which_stop_tokens_may_come(self) -> None:
        rows = SamplingRows(100, 4)
        memory = np.empty(16 * layout.BYTES_PER_ROW, np.uint8)
        params = SamplingParams(min_tokens=2, stop_token_ids=(5,))
        for slot in (1, 2):
            rows.set(slot, params, 10, changes_address=1 << 20, num_changes=(0, 1))
        rows.pack(memory, 16, [1, 2], [10, 10], grammars=[1 << 12, 0])
        _, addresses, words = split(memory, 16)
        assert words[:2, layout.NUM_CHANGES].tolist() == [0, 1]
        assert addresses[:2, layout.GRAMMAR].tolist() == [1 << 12, 0]
        flags = words[:2, layout.FLAGS] & (layout.HAS_GRAMMAR | layout.HAS_CHANGES)
        assert flags.tolist() == [layout.HAS_GRAMMAR, layout.HAS_CHANGES]

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
