"""The embedding lookup on a GPU, from the host's side."""

from __future__ import annotations

from typing import Literal

from engine_runtime.cuda import Stream
from engine_runtime.kernels.kernel_library import KernelLibrary
from engine_runtime.kernels.row_layout import BLOCK


class GpuEmbedding:
    """Turns token ids into the rows of a table, scaled as some models want.

    A token id < 0 stands for the token at ``sampled_tokens[-id - 1]``: what a slot sampled in a step whose
    result the host has not seen yet. Ids outside the vocabulary read the first or last row.
    """

    def __init__(
        self,
        kernels: KernelLibrary,
        dtype: Literal["bf16", "fp16"],
        table_address: int,
        vocab_size: int,
        hidden_size: int,
        scale: float = 1.0,
    ) -> None:
        """
        Args:
            table_address: [vocab_size, hidden_size] of ``dtype``, 16-byte aligned.

        Raises:
            ValueError: ``hidden_size`` is no multiple of 16.
            KernelsMissingError: the kernels were not compiled.
        """
        if hidden_size % 16:
            raise ValueError(f"a hidden size of {hidden_size}, not a multiple of 16")
        self._kernel = kernels.get(f"embed_{dtype}")
        self._table_address = table_address
        self._vocab_size = vocab_size
        self._hidden_size = hidden_size
        self._scale = scale

    def enqueue(
        self,
        stream: Stream,
        num_tokens: int,
        token_ids_address: int,
        sampled_tokens_address: int,
        hidden_address: int,
    ) -> None:
        """Launches the kernel.

        Args:
            num_tokens: T, at least 1.
            token_ids_address: int32 [T].
            sampled_tokens_address: int32 [slots], ``GpuSampler.sampled_tokens_address``.
            hidden_address: [T, hidden_size] of the table's type, 16-byte aligned; overwritten.
        """
        self._kernel.launch(
            (num_tokens, -(-self._hidden_size // BLOCK), 1), stream,
            token_ids_address, sampled_tokens_address, self._table_address, hidden_address,
            self._scale, self._vocab_size, self._hidden_size,
        )  # fmt: skip
