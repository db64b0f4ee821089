"""Sums of normalized hidden states on a GPU, from the host's side."""

from __future__ import annotations

from typing import Literal

from engine_runtime.cuda import Stream
from engine_runtime.kernels.kernel_library import KernelLibrary
from engine_runtime.kernels.row_layout import BLOCK

PIECE_ROWS = 128
"""Rows of a piece at most: so many are summed by one program, and in float32."""

_Type = Literal["bf16", "fp16", "fp32"]


def most_pieces(num_tokens: int, num_sequences: int) -> int:
    """Of a step of so many tokens in which each sequence is cut into pieces."""
    return num_tokens // PIECE_ROWS + num_sequences


class GpuPooling:
    """Adds up the final hidden states of pieces of sequences."""

    def __init__(
        self,
        kernels: KernelLibrary,
        dtype: _Type,
        weight_dtype: _Type,
        weight_address: int,
        hidden_size: int,
        epsilon: float,
    ) -> None:
        """
        Args:
            dtype: of the residual stream.
            weight_address: of the last norm's weight [hidden_size], 16-byte aligned.
            hidden_size: a multiple of 16.
            epsilon: of the norm.

        Raises:
            KernelsMissingError: the kernels were not compiled.
        """
        self._kernel = kernels.get(_name(dtype, weight_dtype))
        self._weight_address = weight_address
        self._hidden_size = hidden_size
        self._epsilon = epsilon

    @staticmethod
    def is_compiled(kernels: KernelLibrary, dtype: _Type, weight_dtype: _Type) -> bool:
        """Whether there is a kernel for these types."""
        return _name(dtype, weight_dtype) in kernels

    def enqueue(
        self, stream: Stream, residual_address: int, pieces_address: int, num_pieces: int, sums_address: int
    ) -> None:
        """Launches the kernel.

        Args:
            residual_address: [T, hidden_size], 16-byte aligned: what the last norm reads.
            pieces_address: int32 [num_pieces, 2], 16-byte aligned: first row, number of rows (at least 1).
            num_pieces: at least 1.
            sums_address: float32 [num_pieces, hidden_size], 16-byte aligned; overwritten.
        """
        self._kernel.launch(
            (num_pieces, -(-self._hidden_size // BLOCK), 1), stream,
            residual_address, self._weight_address, pieces_address, sums_address,
            self._hidden_size, self._epsilon,
        )  # fmt: skip


def _name(dtype: _Type, weight_dtype: _Type) -> str:
    return f"pool_{dtype}_{weight_dtype}"
