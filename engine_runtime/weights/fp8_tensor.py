"""Weights that a checkpoint holds in 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_VALUES: NDArray[np.float32] = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Fp8Tensor:
    """A matrix in E4M3 with a factor for each row.

    Attributes:
        values: float8_e4m3fn [rows, columns]; may be a read-only view of a file.
        scales: float32 [rows].
    """

    values: NDArray[Any]
    scales: NDArray[np.float32]

    def dequantized(self) -> NDArray[np.float32]:
        """Float32 [rows, columns]."""
        values: NDArray[np.float32] = _VALUES[self.values.view(np.uint8)]
        values *= self.scales[:, None]
        return values


def is_scale_shape(shape: tuple[int, ...], rows: int) -> bool:
    """Whether factors of this shape are one for the whole tensor or one for each of its rows."""
    return shape in ((), (1,), (1, 1), (rows,), (rows, 1))
