"""Pooled hidden states against those that the logits of an independent decoder imply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from engine_runtime.executors.prompt_pool import PromptPool
from engine_runtime.factory import RuntimeConfig, create_executor
from engine_runtime.weights.checkpoint import open_checkpoint
from scheduler.executor import Executor
from scheduler.messages import SamplingParams
from tests.engine_runtime.executors.generation import Limited, generate
from tests.reference.dense_decoder import DenseDecoder
from tests.reference.recordings import load_recordings, load_vectors
from tests.reference.tiny_checkpoints import CONFIGS, write_tiny_checkpoint

Vector = NDArray[np.float64]
_RNG = np.random.default_rng(3)
_PROMPTS = [_RNG.integers(3, 250, length).tolist() for length in (1, 2, 16, 40)]


def _expected(path: Path, prompt: Sequence[int], kind: str) -> Vector:
    """Solves logits = W h for the hidden states: W has more rows than columns."""
    checkpoint = open_checkpoint(path)
    logits = DenseDecoder(checkpoint).logits(prompt, len(prompt)).astype(np.float64)
    if (cap := checkpoint.config.final_logit_softcap) is not None:
        logits = np.arctanh(logits / cap) * cap
    name = "model.embed_tokens.weight" if checkpoint.config.tie_word_embeddings else "lm_head.weight"
    weight = checkpoint.read(name).astype(np.float64)
    hidden = np.linalg.lstsq(weight, logits.T, rcond=None)[0].T
    return np.asarray(hidden.mean(axis=0) if kind == "mean" else hidden[-1])


def _pooled(
    executor: Executor, kind: Literal["mean", "last"], prompts: Sequence[Sequence[int]]
) -> list[Vector]:
    results, _ = generate(executor, prompts, 1, SamplingParams(temperature=0.0, pooling=kind))
    return [np.asarray(result.embedding) for result in results]


@pytest.mark.parametrize("kind", ["mean", "last"])
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_against_the_logits(architecture: str, kind: Literal["mean", "last"], tmp_path: Path) -> None:
    write_tiny_checkpoint(architecture, tmp_path)
    executor, _ = create_executor(
        RuntimeConfig(tmp_path, dtype="float32", kv_cache_bytes=4 << 20, num_threads=1)
    )
    found = _pooled(executor, kind, _PROMPTS)
    for prompt, vector in zip(_PROMPTS, found, strict=True):
        expected = _expected(tmp_path, prompt, kind)
        assert vector.shape == (executor.spec.embedding_size,) == expected.shape
        np.testing.assert_allclose(vector, expected, atol=2e-4 * np.abs(expected).max())
    executor.shutdown()


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_it_does_not_depend_on_the_steps(smollm2_int8: Executor, kind: Literal["mean", "last"]) -> None:
    prompts = [_RNG.integers(3, 40_000, length).tolist() for length in (150, 33)]
    whole = _pooled(smollm2_int8, kind, prompts)
    alone = [_pooled(smollm2_int8, kind, [prompt])[0] for prompt in prompts]
    chunked = _pooled(Limited(smollm2_int8, max_num_batched_tokens=24), kind, prompts)
    twice = _pooled(Limited(smollm2_int8, max_num_seqs=1), kind, [prompts[0], prompts[0]])
    for others in (alone, chunked, [twice[1]]):
        for vector, other in zip(whole, others, strict=False):
            np.testing.assert_allclose(other, vector, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_against_transformers(smollm2_float32: Executor, kind: Literal["mean", "last"]) -> None:
    prompts = [recording.prompt_token_ids for recording in load_recordings("smollm2")[::4][:6]]
    found = _pooled(smollm2_float32, kind, prompts)
    for vector, expected in zip(found, load_vectors("smollm2", kind), strict=False):
        np.testing.assert_allclose(vector, expected, atol=1e-4 * np.abs(expected).max())


def test_int8_is_near_float32(smollm2_int8: Executor, smollm2_float32: Executor) -> None:
    prompt = [_RNG.integers(3, 40_000, 60).tolist()]
    for kind in ("mean", "last"):
        a, b = _pooled(smollm2_int8, kind, prompt)[0], _pooled(smollm2_float32, kind, prompt)[0]
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99


def test_it_comes_beside_tokens_and_logprobs(smollm2_int8: Executor) -> None:
    prompt = [[5, 6, 7, 8]]
    params = SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1)
    [plain], _ = generate(smollm2_int8, prompt, 4, params)
    [pooled], _ = generate(smollm2_int8, prompt, 4, replace(params, pooling="mean"))
    assert pooled.embedding is not None
    assert (pooled.token_ids, pooled.logprobs, pooled.prompt_logprobs) == (
        plain.token_ids,
        plain.logprobs,
        plain.prompt_logprobs,
    )


def test_pools() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    mean, last = PromptPool("mean"), PromptPool("last")
    for pool in (mean, last):
        pool.add(rows[:3])
        pool.add(rows[3:])
    assert mean.vector() == tuple(rows.mean(axis=0).tolist())
    assert last.vector() == tuple(rows[3].tolist())
    for pool in (mean, last):
        pool.add_sum(np.float32([9.0, 0.0, 1.0]), 1)
    np.testing.assert_allclose(mean.vector(), [(18 + 9) / 5, 22 / 5, (26 + 1) / 5])
    assert last.vector() == (9.0, 0.0, 1.0)
    with pytest.raises(ZeroDivisionError):
        PromptPool("mean").vector()
