"""The embedding table of the CPU executor: looked up outside the graph, since it is no matrix product."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine_runtime.executors.onnxruntime.quantization import quantize_weight
from engine_runtime.kernels.numpy_types import Float32Array, Int32Array


class EmbeddingTable:
    """Rows [H], already multiplied by the model's embedding scale.

    Attributes:
        num_bytes: memory that the table takes.
    """

    def __init__(self, table: npt.NDArray[np.float32], scale: float, *, is_quantized: bool) -> None:
        """
        Args:
            table: float32 [V, H].
            is_quantized: store each row in int8 with a scale of its own, as the output projection does, which
            in most
                small models is the same matrix.
        """
        self._rows: npt.NDArray[np.int8] | npt.NDArray[np.float32]
        self._scales: Float32Array | None
        if is_quantized:
            self._rows, scales = quantize_weight(table)
            self._scales = scales[:, None] * np.float32(scale)
        else:
            self._rows = table if scale == 1.0 else table * np.float32(scale)
            self._scales = None
        self.num_bytes = self._rows.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def look_up(self, token_ids: Int32Array, hidden: Float32Array) -> None:
        """Writes the rows of ``token_ids`` [T] to the first T rows of ``hidden``."""
        out = hidden[: len(token_ids)]
        if self._scales is None:
            np.take(self._rows, token_ids, axis=0, out=out, mode="clip")
        else:
            np.multiply(self._rows[token_ids], self._scales[token_ids], out=out)
