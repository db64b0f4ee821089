"""Random rows of logits and parameters for the samplers' tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from scheduler.messages import SampledToken, SamplingParams


def random_logits(rng: np.random.Generator, vocab_size: int) -> npt.NDArray[np.float32]:
    """Flat, peaked, with ties, with forbidden tokens."""
    logits = rng.standard_normal(vocab_size) * rng.choice([0.1, 1.0, 4.0, 20.0])
    match rng.integers(4):
        case 1:
            logits = np.round(logits)
        case 2:
            logits[rng.integers(vocab_size, size=50)] += 12.0
        case 3:
            logits[rng.random(vocab_size) < 0.3] = -np.inf
            logits[rng.integers(vocab_size)] = 1.0
    return logits.astype(np.float32)


def random_params(rng: np.random.Generator, vocab_size: int, *, changes: bool = False) -> SamplingParams:
    """How a token is drawn; with ``changes`` also what changes the logits, and log-probabilities."""

    def pick(*values: float) -> float:
        return float(rng.choice(values))

    params: dict[str, object] = {
        "temperature": pick(0.0, 0.3, 0.7, 1.0, 1.7, 5.0),
        "top_k": int(pick(0, 0, 1, 2, 5, 50, vocab_size // 2, vocab_size, vocab_size + 1)),
        "top_p": pick(1.0, 1.0, 0.0, 0.001, 0.3, 0.9, 0.99),
        "min_p": pick(0.0, 0.0, 0.001, 0.1, 1.0),
        "seed": int(rng.integers(2**63)),
    }
    if changes:
        biased = rng.choice(vocab_size, size=int(rng.integers(0, min(6, vocab_size))), replace=False).tolist()
        params |= {
            "presence_penalty": pick(0.0, 0.0, 0.5, -1.0),
            "frequency_penalty": pick(0.0, 0.0, 0.3, 2.0),
            "repetition_penalty": pick(1.0, 1.0, 1.3, 0.7),
            "logit_bias": tuple((token, pick(-100.0, -1.5, 2.0, 30.0)) for token in [*biased, vocab_size]),
            "stop_token_ids": tuple(rng.integers(0, vocab_size, 3).tolist()),
            "min_tokens": int(pick(0, 3, 6)),
            "logprobs": rng.choice([None, 0, 1, 5, 20]),
        }
    return SamplingParams(**params)  # type: ignore[arg-type]


def cpu_sample(
    logits: npt.NDArray[np.float32], params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int
) -> SampledToken:
    """What the CPU's sampler makes of a row."""
    from engine_runtime.sampling import Sampler, SamplingRow  # needs numba, which a GPU machine may lack

    row = SamplingRow("r", params, np.array(token_ids, np.int32), num_prompt_tokens)
    return Sampler(len(logits)).sample(logits[None].copy(), [row])[0]


def assert_same_logprobs(ours: SampledToken, theirs: SampledToken) -> None:
    """Up to rounding."""
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
