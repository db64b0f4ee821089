"""The default model in float32 against transformers and torch: 40 prompts of 1 to 1,500 tokens, greedy, 24
tokens.

The model has steps whose two best logits are closer than float32 can tell. There either token is right, and
since the text goes on differently after the other one, the rest of that prompt is not compared;
``Recording.check_tokens`` knows.

Each prompt runs in one of the modes at least. With INFLIGHTD_ALL_PROMPTS=1, all modes take all of them and
generate the 64 tokens that were recorded.
"""

from __future__ import annotations

import os

import pytest

from scheduler.executor import Executor
from scheduler.messages import EngineStats
from tests.engine_runtime.executors.generation import Generated, Limited, generate
from tests.reference.recordings import Recording, load_recordings

_ALL_PROMPTS = os.environ.get("INFLIGHTD_ALL_PROMPTS") == "1"
_NUM_TOKENS = 64 if _ALL_PROMPTS else 24  # behind each prompt, at least one block of 16 begins


def _parts(recordings: list[Recording], *parts: slice) -> list[list[Recording]]:
    """The first part; all of them, which cover all prompts, if that is asked for."""
    return [recordings[part] for part in (parts if _ALL_PROMPTS else parts[:1])]


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    found = load_recordings("smollm2")
    assert len(found) == 40
    assert all(len(recording.token_ids) == 64 for recording in found)
    return found


def _run(
    executor: Executor, recordings: list[Recording], num_tokens: int = _NUM_TOKENS
) -> tuple[list[Generated], EngineStats]:
    """Generates for all recorded prompts and compares; nearly every token must have been comparable."""
    prompts = [recording.prompt_token_ids for recording in recordings]
    results, stats = generate(executor, prompts, num_tokens)
    compared = 0
    for recording, result in zip(recordings, results, strict=True):
        assert len(result.token_ids) == num_tokens
        compared += recording.check_tokens(result.token_ids)
    assert compared >= 0.9 * num_tokens * len(recordings)
    return results, stats


def test_alone(smollm2_float32: Executor, recordings: list[Recording]) -> None:
    # A step of one sequence reads all weights for one token: every eighth prompt, from 5 to 600 tokens.
    for part in _parts(recordings, *(slice(i, None, 8) for i in (3, 0, 1, 2, 4, 5, 6, 7))):
        for recording in part:
            _run(smollm2_float32, [recording])


def test_sixteen_at_a_time(smollm2_float32: Executor, recordings: list[Recording]) -> None:
    for part in _parts(recordings, slice(0, None, 2), slice(1, None, 2)):
        _, stats = _run(Limited(smollm2_float32, max_num_seqs=16), part)
        assert stats.preemptions_total == 0


def test_chunked_at_32_tokens(smollm2_float32: Executor, recordings: list[Recording]) -> None:
    # Five prompts, from 15 to 1,500 tokens.
    for part in _parts(recordings, *(slice(i, None, 8) for i in (7, 0, 1, 2, 3, 4, 5, 6))):
        limited = Limited(smollm2_float32, max_num_seqs=8, max_num_batched_tokens=32)
        _run(limited, part)
        assert max(step.num_tokens for step in limited.steps) == 32
        chunks = [s for step in limited.steps for s in step.scheduled if not s.samples]
        assert len(chunks) > sum(len(recording.prompt_token_ids) for recording in part) // 64


def test_prefix_hits(smollm2_float32: Executor, recordings: list[Recording]) -> None:
    # The second group starts as the first ends, and finds all full blocks of its prompts but the last.
    for part in _parts(recordings, *(slice(i, None, 4) for i in (1, 0, 2, 3))):
        some = [recording for recording in part if len(recording.prompt_token_ids) > 16]
        limited = Limited(smollm2_float32, max_num_seqs=len(some))
        results, stats = _run(limited, some + some)
        assert all(result.num_cached_tokens >= 16 for result in results[len(some) :])
        full_blocks = sum(len(r.prompt_token_ids) // 16 * 16 - 16 for r in some)
        assert stats.prefix_cache_hits_total >= full_blocks


@pytest.mark.usefixtures("frequent_preemptions")
def test_forced_preemptions(smollm2_float32: Executor, recordings: list[Recording]) -> None:
    # All prompts of a group are admitted together into a pool that cannot hold their answers too.
    groups = [recordings[:12], recordings[12:24], *(recordings[i : i + 2] for i in range(24, 40, 2))]
    for group in groups if _ALL_PROMPTS else groups[1:2]:
        longest = max(len(recording.prompt_token_ids) for recording in group) + 64
        prompt_blocks = sum(-(-len(recording.prompt_token_ids) // 16) for recording in group)
        limited = Limited(
            smollm2_float32,
            num_blocks=max(prompt_blocks + len(group) - 1, -(-longest // 16)),
            max_model_len=longest,
        )
        _, stats = _run(limited, group, 64)  # long enough to need more blocks
        assert stats.preemptions_total >= max(len(group) // 3, 1)
