"""Every architecture's segments and weights against what transformers and torch answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engine_runtime.weights.checkpoint import open_checkpoint
from tests.reference.dense_decoder import DenseDecoder
from tests.reference.gemma3_270m import cached_gemma3_270m
from tests.reference.recordings import LOGIT_TOLERANCE, Recording, load_recordings
from tests.reference.tiny_checkpoints import CONFIGS, write_tiny_checkpoint

# float32 and float64 differ by 1.4e-5 at most on these models.
_TINY_TOLERANCE = 1e-4


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_tiny_checkpoint_generates_the_same_tokens_and_logits(architecture: str, tmp_path: Path) -> None:
    decoder = DenseDecoder(open_checkpoint(write_tiny_checkpoint(architecture, tmp_path)))
    for recording in load_recordings(architecture):
        tokens = (*recording.prompt_token_ids, *recording.token_ids[:-1])
        logits = decoder.logits(tokens, len(recording.token_ids))
        recording.check_tokens(logits.argmax(axis=-1).tolist(), _TINY_TOLERANCE)
        steps = list(recording.full_steps)
        np.testing.assert_allclose(logits[steps], recording.full_logits, rtol=0, atol=_TINY_TOLERANCE)


def test_default_model_generates_the_same_tokens_and_logits(smollm2_path: Path) -> None:
    # Every eighth prompt covers 1 to 384 tokens; the executor's tests run all forty.
    check_recordings(smollm2_path, load_recordings("smollm2")[::8])


@pytest.mark.skipif(
    cached_gemma3_270m() is None,
    reason="240 MB under the Gemma terms, fetched only by: make gemma",
)
def test_gemma3_270m_generates_the_same_tokens_and_logits() -> None:
    path = cached_gemma3_270m()
    assert path is not None
    check_recordings(path, load_recordings("gemma3-270m"))


def check_recordings(path: Path, recordings: Sequence[Recording]) -> None:
    decoder = DenseDecoder(open_checkpoint(path))
    for recording in recordings:
        tokens = (*recording.prompt_token_ids, *recording.token_ids[:-1])
        logits = decoder.logits(tokens, len(recording.token_ids))
        recording.check_tokens(logits.argmax(axis=-1).tolist())
        steps = np.arange(len(logits))
        best_two = np.stack([logits[steps, recording.token_ids], logits[steps, recording.second_ids]], axis=1)
        np.testing.assert_allclose(best_two, recording.top_logits, rtol=0, atol=LOGIT_TOLERANCE)
