"""From the final hidden states of a prompt's tokens to one vector, while they come in chunks."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from engine_runtime.kernels.numpy_types import Float32Array, Float64Array


class PromptPool:
    """Pools what is added to it: to the mean of all rows, summed in float64, or to the last row."""

    def __init__(self, kind: Literal["mean", "last"]) -> None:
        self._is_mean = kind == "mean"
        self._sum: npt.NDArray[np.float64] = np.zeros(1)
        self._num_rows = 0

    def add(self, rows: Float32Array) -> None:
        """Takes the hidden states [N, H] of the next tokens, N at least 1."""
        if not self._is_mean:
            rows = rows[-1:]
        self.add_sum(rows.sum(axis=0, dtype=np.float64), len(rows))

    def add_sum(self, total: Float32Array | Float64Array, num_rows: int) -> None:
        """Takes the sum [H] of the hidden states of ``num_rows`` tokens; for the last row, that row alone."""
        if not self._is_mean:
            self._sum, self._num_rows = np.zeros(1), 0
        self._sum = self._sum + total
        self._num_rows += num_rows

    def vector(self) -> tuple[float, ...]:
        """The H numbers. Raises ZeroDivisionError if nothing was added."""
        scale = 1.0 / self._num_rows
        return tuple((self._sum * scale).tolist())
