"""What the executor keeps of a sequence from its first step until it is released."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine_runtime.executors.prompt_pool import PromptPool
from engine_runtime.kernels.numpy_types import Int32Array
from scheduler.messages import NewSequence, SamplingParams


class GrowingArray:
    """int32 numbers that are appended to; ``view`` is valid until the next ``extend``."""

    def __init__(self, values: Sequence[int]) -> None:
        self._size = len(values)
        self._array = np.empty(max(16, self._size + self._size // 2), np.int32)
        self._array[: self._size] = values

    def __len__(self) -> int:
        return self._size

    @property
    def view(self) -> Int32Array:
        return self._array[: self._size]

    def extend(self, values: Sequence[int]) -> None:
        size = self._size + len(values)
        if size > len(self._array):
            grown = np.empty(2 * size, np.int32)
            grown[: self._size] = self._array[: self._size]
            self._array = grown
        self._array[self._size : size] = values
        self._size = size


class SequenceState:
    """The tokens and the block table of one sequence.

    Attributes:
        token_ids: prompt and generated tokens.
        block_ids: entry i holds the tokens from i * block_size on.
        pool: what becomes of the final hidden states of the prompt, if the client asked for it.
    """

    def __init__(self, new: NewSequence) -> None:
        self.request_id = new.request_id
        self.params: SamplingParams = new.params
        self.num_prompt_tokens = new.num_prompt_tokens
        self.token_ids = GrowingArray(new.token_ids)
        self.block_ids = GrowingArray(new.block_ids)
        self.pool = None if new.params.pooling is None else PromptPool(new.params.pooling)
