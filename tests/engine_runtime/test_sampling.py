"""The sampler against a reference in plain numpy that sorts, in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from engine_runtime.sampling import Sampler, SamplingRow, uniform
from scheduler.messages import SampledToken, SamplingParams

VOCAB_SIZES = (2, 15, 16, 17, 100, 256, 300, 4096, 5001)


def record(
    token_ids: list[int] | None = None, num_prompt_tokens: int | None = None, **params: object
) -> SamplingRow:
    ids = [1, 0, 1] if token_ids is None else token_ids
    count = len(ids) if num_prompt_tokens is None else num_prompt_tokens
    return SamplingRow("r", SamplingParams(**params), np.array(ids, np.int32), count)  # type: ignore[arg-type]


def sample_one(logits: npt.ArrayLike, row: SamplingRow) -> SampledToken:
    matrix = np.array(logits, np.float32).reshape(1, -1)
    return Sampler(matrix.shape[1]).sample(matrix, [row])[0]


def reference_logits(logits: npt.NDArray[np.float32], row: SamplingRow) -> npt.NDArray[np.float64]:
    """Logits after min_tokens, bias and penalties, token by token."""
    params = row.params
    changed = logits.astype(np.float64)
    prompt = set(row.token_ids[: row.num_prompt_tokens].tolist())
    generated = row.token_ids[row.num_prompt_tokens :].tolist()
    for token, bias in params.logit_bias:
        changed[token] += bias
    if len(generated) < params.min_tokens:
        for token in params.stop_token_ids:
            changed[token] = -np.inf
    for token in range(len(logits)):
        if token in prompt or token in generated:
            factor = params.repetition_penalty
            changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
        changed[token] -= params.frequency_penalty * generated.count(token)
        changed[token] -= params.presence_penalty * (token in generated)
    return changed


def reference_probabilities(
    logits: npt.NDArray[np.float64], params: SamplingParams
) -> npt.NDArray[np.float64]:
    """The distribution a token is drawn from. Equal logits are ranked by token id."""
    weights = np.exp((logits - logits.max()) / params.temperature)
    order = np.lexsort((np.arange(len(weights)), -weights))
    kept = weights[order] >= params.min_p
    if params.top_k > 0:
        kept[params.top_k :] = False
    if params.top_p < 1.0:
        mass = np.where(kept, weights[order], 0.0)
        before = np.cumsum(mass) - mass
        kept[1:] &= before[1:] < params.top_p * mass.sum()  # the most likely one always stays
    probabilities = np.zeros_like(weights)
    probabilities[order[kept]] = weights[order[kept]]
    result: npt.NDArray[np.float64] = probabilities / probabilities.sum()
    return result


def random_logits(rng: np.random.Generator, vocab_size: int) -> npt.NDArray[np.float32]:
    kind = rng.integers(4)
    logits = rng.standard_normal(vocab_size) * rng.choice([0.1, 1.0, 4.0, 20.0])
    if kind == 1:  # many ties
        logits = np.round(logits)
    if kind == 2:  # a few tokens far above the rest
        logits[rng.integers(vocab_size, size=3)] += 15.0
    if kind == 3:  # forbidden tokens
        logits[rng.random(vocab_size) < 0.3] = -np.inf
        logits[rng.integers(vocab_size)] = 1.0
    return logits.astype(np.float32)


def random_params(rng: np.random.Generator, vocab_size: int) -> SamplingParams:
    return SamplingParams(
        temperature=float(rng.choice([0.3, 0.7, 1.0, 1.7, 5.0])),
        top_k=int(rng.choice([0, 0, 1, 2, 5, 40, vocab_size, vocab_size + 1])),
        top_p=float(rng.choice([1.0, 1.0, 0.0, 0.001, 0.3, 0.9, 0.99])),
        min_p=float(rng.choice([0.0, 0.0, 0.001, 0.1, 1.0])),
        seed=int(rng.integers(2**63)),
    )


class TestUniform:
    def test_mixing_is_splitmix64(self) -> None:
        from engine_runtime.sampling import _mix

        # The first outputs of the published generator for the state 0.
        golden = 0x9E3779B97F4A7C15
        outputs = [_mix(i * golden % 2**64) for i in (1, 2, 3)]
        assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]

    def test_stays_in_range_for_extreme_arguments(self) -> None:
        for seed in (0, 1, -1, 2**63, 2**64 - 1):
            for position in (0, 1, 2**31, 2**40):
                assert 0.0 <= uniform(seed, position) < 1.0

    @pytest.mark.parametrize("axis", ["position", "seed"])
    def test_is_uniform_and_uncorrelated_along(self, axis: str) -> None:
        n = 20_000
        u = np.array([uniform(7, i) if axis == "position" else uniform(i, 7) for i in range(n)])
        counts = np.bincount((u * 64).astype(int), minlength=64)
        chi_square = ((counts - n / 64) ** 2 / (n / 64)).sum()
        assert chi_square < 103.4  # 99.9 % quantile for 63 degrees of freedom
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(n)
        assert len(np.unique(u)) == n


class TestGreedy:
    @pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
    def test_takes_the_first_of_the_largest(self, vocab_size: int) -> None:
        rng = np.random.default_rng(vocab_size)
        logits = np.round(rng.standard_normal((20, vocab_size)) * 3).astype(np.float32)
        logits[0] = -5.0
        logits[1, -1] = 100.0
        sampled = Sampler(vocab_size).sample(logits.copy(), [record(temperature=0.0)] * 20)
        assert [s.token_id for s in sampled] == logits.argmax(axis=1).tolist()
        assert all(s.is_valid and s.logprobs is None for s in sampled)

    def test_a_vanishing_temperature_is_greedy(self) -> None:
        assert sample_one([0.0, 1.0, 1.0], record(temperature=1e-30)).token_id == 1

    def test_finds_a_single_finite_logit(self) -> None:
        logits = np.full(1000, -np.inf)
        logits[777] = -1e30
        for temperature in (0.0, 1.0):
            sampled = sample_one(logits, record(temperature=temperature))
            assert (sampled.token_id, sampled.is_valid) == (777, True)


class TestInvalidLogits:
    @pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf])
    @pytest.mark.parametrize("place", [0, 17, 255, 4097, 5000])
    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_only_the_poisoned_row_is_invalid(self, poison: float, place: int, temperature: float) -> None:
        logits = np.random.default_rng(0).standard_normal((3, 5001)).astype(np.float32)
        clean = Sampler(5001).sample(logits.copy(), [record(temperature=temperature, logprobs=3)] * 3)
        logits[1, place] = poison
        sampled = Sampler(5001).sample(logits, [record(temperature=temperature, logprobs=3)] * 3)
        assert [s.is_valid for s in sampled] == [True, False, True]
        assert sampled[0] == clean[0]
        assert sampled[2] == clean[2]
        assert sampled[1].logprobs is None
        assert 0 <= sampled[1].token_id < 5001

    def test_nothing_finite(self) -> None:
        assert not sample_one([-np.inf] * 20, record()).is_valid

    def test_everything_forbidden(self) -> None:
        row = record(min_tokens=1, stop_token_ids=(0, 1), temperature=0.0)
        assert not sample_one([1.0, 2.0], row).is_valid


class TestDrawing:
    def test_equals_the_inverse_of_the_sorted_reference(self) -> None:
        rng = np.random.default_rng(3)
        exact = 0
        for _ in range(600):
            vocab_size = int(rng.choice(VOCAB_SIZES))
            logits, params = random_logits(rng, vocab_size), random_params(rng, vocab_size)
            probabilities = reference_probabilities(logits.astype(np.float64), params)
            token = sample_one(logits, SamplingRow("r", params, np.arange(9, dtype=np.int32), 4)).token_id
            cumulative = np.cumsum(probabilities)
            target = uniform(params.seed, 9)
            expected = int(np.searchsorted(cumulative, target, side="right"))
            exact += token == expected
            # Otherwise rounding decided: about a token of the cut, or about a border of the cumulative sum.
            near = cumulative[token] - probabilities[token] - 1e-4 < target < cumulative[token] + 1e-4
            assert near, (params, vocab_size, token, expected)
        assert exact >= 597

    @pytest.mark.parametrize(
        "params",
        [
            {},
            {"temperature": 0.5},
            {"temperature": 2.0, "top_k": 5},
            {"top_p": 0.7},
            {"min_p": 0.2},
            {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
        ],
        ids=str,
    )
    def test_frequencies_follow_the_distribution(self, params: dict[str, float]) -> None:
        rng = np.random.default_rng(5)
        logits = np.round(rng.standard_normal(23) * 1.5, 1).astype(np.float32)
        n = 4000
        rows = [record(seed=seed, **params) for seed in range(n)]
        sampled = Sampler(23).sample(np.tile(logits, (n, 1)), rows)
        counts = np.bincount([s.token_id for s in sampled], minlength=23)
        expected = n * reference_probabilities(logits.astype(np.float64), rows[0].params)
        assert not counts[expected == 0].any()
        possible = expected > 0
        chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        degrees = possible.sum() - 1
        # Wilson and Hilferty's approximation of the 99.9 % quantile.
        limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3
        assert chi_square < limit

    def test_ties_are_cut_by_token_id(self) -> None:
        for params in ({"top_k": 3}, {"top_p": 0.3}):
            rows = [record(seed=seed, **params) for seed in range(200)]
            sampled = Sampler(10).sample(np.zeros((200, 10), np.float32), rows)
            assert {s.token_id for s in sampled} == {0, 1, 2}

    def test_a_flat_distribution_over_a_large_vocabulary(self) -> None:
        size = 151_936
        logits = (np.random.default_rng(1).standard_normal(size) * 0.01).astype(np.float32)
        rows = [record(seed=seed, top_p=0.5) for seed in range(40)]
        sampled = Sampler(size).sample(np.tile(logits, (40, 1)), rows)
        median = np.median(logits)
        assert all(logits[s.token_id] >= median - 1e-3 for s in sampled)
        assert len({s.token_id for s in sampled}) == 40


class TestReproducibility:
    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        rng = np.random.default_rng(11)
        rows, logits = [], np.stack([random_logits(rng, 5001) for _ in range(24)])
        for i in range(24):
            params = random_params(rng, 5001)
            rows.append(SamplingRow(str(i), params, rng.integers(5001, size=i + 1, dtype=np.int32), 1))
        alone = [Sampler(5001).sample(logits[i : i + 1].copy(), [rows[i]])[0] for i in range(24)]
        assert Sampler(5001).sample(logits.copy(), rows) == alone
        order = rng.permutation(24)
        shuffled = Sampler(5001).sample(logits[order], [rows[i] for i in order])
        assert shuffled == [alone[i] for i in order]

    def test_seed_and_position_both_matter(self) -> None:
        logits = np.zeros((1, 4096), np.float32)

        def token(seed: int, length: int) -> int:
            return Sampler(4096).sample(logits.copy(), [record([0] * length, 1, seed=seed)])[0].token_id

        assert token(1, 5) == token(1, 5)
        assert len({token(1, 5), token(2, 5), token(1, 6), token(2, 6)}) == 4

    def test_where_the_prompt_ends_does_not_matter(self) -> None:
        logits = np.zeros(4096)
        ids = [3, 4, 5, 6]
        assert sample_one(logits, record(ids, 1, seed=9)) == sample_one(logits, record(ids, 4, seed=9))


class TestChangedLogits:
    def test_greedy_choice_equals_the_reference(self) -> None:
        rng = np.random.default_rng(13)
        sampler = Sampler(60)
        for _ in range(300):
            logits = (rng.standard_normal(60) * 2).astype(np.float32)
            length = int(rng.integers(1, 80))
            params = SamplingParams(
                temperature=0.0,
                presence_penalty=float(rng.choice([0.0, 0.6, -1.3])),
                frequency_penalty=float(rng.choice([0.0, 0.4, -0.7])),
                repetition_penalty=float(rng.choice([1.0, 1.3, 0.8])),
                logit_bias=tuple((t, float(rng.normal() * 3)) for t in range(rng.integers(4))),
                min_tokens=int(rng.choice([0, 5, 100])),
                stop_token_ids=tuple(rng.permutation(60)[: rng.integers(30)].tolist()),
            )  # fmt: skip
            ids = rng.integers(60, size=length, dtype=np.int32)
            row = SamplingRow("r", params, ids, int(rng.integers(1, length + 1)))
            expected = reference_logits(logits, row)
            token = sampler.sample(logits[None].copy(), [row])[0].token_id
            assert expected[token] >= expected.max() - 1e-5

    def test_presence_and_frequency_ignore_the_prompt(self) -> None:
        row = record([1, 1, 1], 3, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
        assert sample_one([0.0, 1.0], row).token_id == 1
        row = record([0, 1], 1, temperature=0.0, presence_penalty=2.0)
        assert sample_one([0.0, 1.0], row).token_id == 0

    def test_repetition_counts_the_prompt(self) -> None:
        row = record([1], 1, temperature=0.0, repetition_penalty=2.0)
        assert sample_one([0.6, 1.0], row).token_id == 0
        assert sample_one([-3.0, -1.0], row).token_id == 1
        assert sample_one([-1.5, -1.0], row).token_id == 0

    def test_min_tokens_counts_generated_tokens(self) -> None:
        params = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (1, 99)}
        assert sample_one([0.0, 1.0], record([0, 0, 0], 2, **params)).token_id == 0
        assert sample_one([0.0, 1.0], record([0, 0, 0], 1, **params)).token_id == 1

    def test_ids_outside_the_vocabulary_are_ignored(self) -> None:
        row = record([1, 7, -1], 1, temperature=0.0, repetition_penalty=2.0, logit_bias=((5, 9.0), (-1, 9.0)))
        assert sample_one([0.6, 1.0], row).token_id == 0

    def test_one_row_does_not_change_the_next(self) -> None:
        sampler = Sampler(8)
        penalized = record([1, 2, 2], 1, temperature=0.0, repetition_penalty=1.5, frequency_penalty=1.0)
        logits = np.array([[1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]] * 2, np.float32)
        first = sampler.sample(logits.copy(), [penalized, penalized])
        assert first[0] == first[1]
        assert sampler.sample(logits.copy(), [penalized, penalized]) == first


class TestLogprobs:
    @pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
    @pytest.mark.parametrize("top_n", [0, 1, 2, 20])
    def test_equal_the_raw_distribution(self, vocab_size: int, top_n: int) -> None:
        rng = np.random.default_rng(vocab_size)
        for scale in (0.5, 3.0, 40.0):
            logits = (rng.standard_normal(vocab_size) * scale).astype(np.float32)
            row = record(
                [0, 1], 1, temperature=0.7, repetition_penalty=1.4, logit_bias=((0, 2.0),), logprobs=top_n
            )
            sampled = sample_one(logits, row)
            exact = logits.astype(np.float64)
            exact = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
            record_ = sampled.logprobs
            assert record_ is not None
            assert record_.token_id == sampled.token_id
            assert record_.logprob == pytest.approx(exact[sampled.token_id], abs=2e-5)
            assert record_.rank == 1 + (logits > logits[sampled.token_id]).sum()
            order = np.lexsort((np.arange(vocab_size), -logits))[:top_n]
            assert [token for token, _ in record_.top] == order.tolist()
            assert [value for _, value in record_.top] == pytest.approx(exact[order].tolist(), abs=2e-5)

    def test_ties_rank_by_token_id(self) -> None:
        sampled = sample_one(np.zeros(50), record(temperature=0.0, logprobs=4))
        assert sampled.logprobs is not None
        assert [token for token, _ in sampled.logprobs.top] == [0, 1, 2, 3]
        assert sampled.logprobs.rank == 1

    def test_only_rows_that_ask_get_them(self) -> None:
        logits = np.zeros((2, 32), np.float32)
        sampled = Sampler(32).sample(logits, [record(), record(logprobs=0)])
        assert sampled[0].logprobs is None
        assert sampled[1].logprobs is not None
        assert sampled[1].logprobs.top == ()

    def test_of_a_prompt(self) -> None:
        rng = np.random.default_rng(17)
        logits = (rng.standard_normal((7, 300)) * 3).astype(np.float32)
        targets = rng.integers(300, size=7)
        before = logits.copy()
        records = Sampler(300).prompt_logprobs(logits, targets, 3)
        exact = logits.astype(np.float64)
        exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
        for i, entry in enumerate(records):
            assert entry.token_id == targets[i]
            assert entry.logprob == pytest.approx(exact[i, targets[i]], abs=2e-5)
            assert entry.rank == 1 + (logits[i] > logits[i, targets[i]]).sum()
            assert [token for token, _ in entry.top] == np.argsort(-logits[i], kind="stable")[:3].tolist()
        assert (logits == before).all()

    def test_of_a_poisoned_prompt(self) -> None:
        logits = np.zeros((2, 32), np.float32)
        logits[0, 3] = np.nan
        first, second = Sampler(32).prompt_logprobs(logits, [1, 1], 2)
        assert first.logprob == -np.inf
        assert first.top == ()
        assert second.logprob == pytest.approx(-np.log(32))


def test_a_new_sampler_has_compiled_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(64)

    def fail(*_: object) -> None:
        raise AssertionError("a kernel is compiled during a request")

    monkeypatch.setattr("numba.core.dispatcher.Dispatcher.compile", fail)
    rows = [
        record(temperature=0.0),
        record(top_k=3, min_p=0.1, logprobs=5, presence_penalty=0.5),
        record(min_tokens=5, stop_token_ids=(1,), logit_bias=((2, 1.0),)),
    ]
    sampler.sample(np.zeros((3, 64), np.float32), rows)
    sampler.prompt_logprobs(np.zeros((3, 64), np.float32), [1, 2, 3], 2)


class TestArguments:
    def test_wrong_logits_are_refused(self) -> None:
        sampler = Sampler(8)
        for logits in (np.zeros((2, 8), np.float32), np.zeros((1, 9), np.float32), np.zeros((1, 8))):
            with pytest.raises(ValueError, match="float32"):
                sampler.sample(logits, [record()])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="contiguous"):
            sampler.sample(np.zeros((8, 2), np.float32).T[:1], [record()])

    def test_no_rows(self) -> None:
        assert Sampler(8).sample(np.empty((0, 8), np.float32), []) == []


def masked(row: SamplingRow, allowed: list[int], vocab_size: int) -> SamplingRow:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[allowed] = 1
    return replace(row, mask=np.packbits(bits, bitorder="little").view(np.int32))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_only_tokens_of_the_mask_are_sampled(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    sampler = Sampler(vocab_size)
    for count in {1, max(1, vocab_size // 3), vocab_size - 1}:
        allowed = sorted(rng.choice(vocab_size, count, replace=False).tolist())
        logits = (rng.standard_normal((24, vocab_size)) * 4).astype(np.float32)
        greedy = [masked(record(temperature=0.0), allowed, vocab_size)] * 12
        drawn = [masked(record(seed=seed), allowed, vocab_size) for seed in range(12)]
        best = [allowed[int(np.argmax(row[allowed]))] for row in logits[:12]]
        found = [token.token_id for token in sampler.sample(logits, [*greedy, *drawn])]
        assert found[:12] == best
        assert set(found) <= set(allowed)


def test_log_probabilities_are_those_before_the_mask() -> None:
    logits = np.array([[1.0, 5.0, 2.0]], np.float32)
    row = masked(record(temperature=0.0, logprobs=1), [0, 2], 3)
    (token,) = Sampler(3).sample(logits.copy(), [row])
    expected = 2.0 - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert token.token_id == 2
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(expected, abs=1e-5)
    assert token.logprobs.rank == 2
    assert token.logprobs.top[0][0] == 1


def test_the_mask_says_by_itself_whether_stop_tokens_may_come() -> None:
    row = masked(record(temperature=0.0, min_tokens=9, stop_token_ids=(2,)), [2], 3)
    (token,) = Sampler(3).sample(np.zeros((1, 3), np.float32), [row])
    assert (token.token_id, token.is_valid) == (2, True)


def test_a_mask_of_nothing_fails_its_row_only() -> None:
    rows = [masked(record(temperature=0.0), [], 3), record(temperature=0.0)]
    nothing, free = Sampler(3).sample(np.zeros((2, 3), np.float32), rows)
    assert not nothing.is_valid
    assert free.is_valid
