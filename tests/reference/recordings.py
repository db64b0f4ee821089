"""What transformers and torch answered, as ``record`` stored it, and how to compare with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent / "recorded"

# How far two float32 implementations of one model may lie apart in a logit. Measured over all recordings:
# float32 against float64 8e-5, the segments in ONNX Runtime against torch 1.4e-4 (after 1,500 tokens).
LOGIT_TOLERANCE = 5e-4


@dataclass(frozen=True)
class Recording:
    """Greedy generation after one prompt, in float32.

    Attributes:
        token_ids: [N] generated; an end-of-sequence token does not end it.
        second_ids: [N] the second best token of each step.
        top_logits: [N, 2] of the two best tokens.
        full_steps: [F] the steps whose logits were kept whole.
        full_logits: [F, vocab_size]; empty for large vocabularies.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    second_ids: tuple[int, ...]
    top_logits: NDArray[np.float32]
    full_steps: tuple[int, ...]
    full_logits: NDArray[np.float32]

    def check_tokens(self, token_ids: Sequence[int], tolerance: float = LOGIT_TOLERANCE) -> int:
        """Asserts that ``token_ids`` is the same greedy generation.

        The first step that differs must be a near tie, taken the other way; what follows it is another text
        and is not compared.

        Returns:
            How many tokens were compared.
        """
        for step, (token_id, expected) in enumerate(zip(token_ids, self.token_ids, strict=False)):
            if token_id == expected:
                continue
            gap = float(self.top_logits[step, 0] - self.top_logits[step, 1])
            if gap < tolerance and token_id == self.second_ids[step]:
                return step
            raise AssertionError(
                f"prompt of {len(self.prompt_token_ids)} tokens, step {step}: token {token_id} instead of "
                f"{expected}, which leads {self.second_ids[step]} by {gap:.5f}"
            )
        return min(len(token_ids), len(self.token_ids))


def load_recordings(name: str) -> list[Recording]:
    """The recordings of ``smollm2`` or of one of the tiny checkpoints, in the order of their prompts."""
    with np.load(FOLDER / f"{name}.npz") as data:
        arrays = dict(data)
    ends = np.cumsum(arrays["prompt_lengths"])
    prompts = np.split(arrays["prompts"], ends[:-1])
    full_steps = tuple(arrays["full_steps"].tolist())
    return [
        Recording(
            prompt_token_ids=tuple(prompt.tolist()),
            token_ids=tuple(arrays["tokens"][i].tolist()),
            second_ids=tuple(arrays["seconds"][i].tolist()),
            top_logits=arrays["top_logits"][i],
            full_steps=full_steps,
            full_logits=arrays["full_logits"][i],
        )
        for i, prompt in enumerate(prompts)
    ]


def load_vectors(name: str, kind: Literal["mean", "last"]) -> list[NDArray[np.float32]]:
    """Pooled final hidden states [H] of every fourth prompt of the recordings ``name``."""
    with np.load(FOLDER / f"{name}-vectors.npz") as data:
        return list(data[kind])
