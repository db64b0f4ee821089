"""Weights as pieces, each copied to the device at once: where its bytes come from and where they go.

What a file holds as the device wants it is read from the file; the rest is computed, or converted from a
mapping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine_runtime.executors.tensorrt.weight_plan import NUMPY_TYPES, Fp8Rows, StoredTensor, WeightPlan
from engine_runtime.weights.checkpoint import Checkpoint
from engine_runtime.weights.file_tensor import FileTensor
from engine_runtime.weights.fp8_tensor import E4M3
from engine_runtime.weights.mapped_pages import populate, release

Array = npt.NDArray[Any]
_PIECE_BYTES = 4 << 20  # with 1 or 16 MiB loading takes two to three times as long (one H200)
_ALIGNMENT = 256


class ByteSource(Protocol):
    """The bytes of a tensor."""

    def read_into(self, start: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fills ``buffer`` with the bytes from ``start`` on. May be called from several threads."""
        ...


class ConvertedArray:
    """The bytes of an array in another type, or in its own; implements ``ByteSource``.

    Pages of a mapped file are this process's only while they are converted.
    """

    def __init__(self, values: Array, dtype: np.dtype[Any]) -> None:
        self._values = values.reshape(-1)
        self._dtype = dtype

    def read_into(self, start: int, buffer: npt.NDArray[np.uint8]) -> None:
        """``start`` and the buffer's length are multiples of an item."""
        first, count = start // self._dtype.itemsize, len(buffer) // self._dtype.itemsize
        source = self._values[first : first + count]
        destination: Array = buffer.view(self._dtype)
        populate(source)
        if source.dtype == self._dtype:  # plain bytes are copied fastest
            source, destination = source.view(np.uint8), buffer
        np.copyto(destination, source, casting="unsafe")
        release(source)


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that are copied to the device at once.

    Attributes:
        start: of the bytes, in ``source``.
        place: their offset from the start of the allocation; or the rows that the device makes of them,
            which are 16-bit numbers.
    """

    source: ByteSource
    start: int
    num_bytes: int
    place: int | Fp8Rows

    @property
    def stored_bytes(self) -> int:
        """As they lie on the device in the end."""
        return self.num_bytes if isinstance(self.place, int) else self.place.num_bytes

    def read_into(self, buffer: npt.NDArray[np.uint8]) -> None:
        """Fills a buffer of ``num_bytes``.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        self.source.read_into(self.start, buffer)


def largest_piece(plan: WeightPlan) -> int:
    """Bytes; at least a row of any matrix that is to be quantized."""
    rows = [2 * tensor.shape[1] for tensor in plan.tensors if tensor.scale_offset is not None]
    return -(-max([_PIECE_BYTES, *rows]) // _ALIGNMENT) * _ALIGNMENT


def pieces_of(tensor: StoredTensor, checkpoint: Checkpoint, piece_bytes: int) -> list[Piece]:
    """All of a tensor, with the factors if the checkpoint holds it in E4M3; computed now if it must be.

    Args:
        piece_bytes: at most; a multiple of 4, and at least a row if the tensor is to be quantized.

    Raises:
        CheckpointError: the tensor has a type that is not supported, or a factor is not a finite number.
    """
    dtype = NUMPY_TYPES[tensor.dtype]
    if tensor.scale_offset is None:
        source = _source(tensor, checkpoint, dtype, checkpoint.read)
        return _split(source, tensor.num_bytes, tensor.offset, piece_bytes)
    if not checkpoint.is_fp8(tensor.name):
        return _split_rows(_source(tensor, checkpoint, dtype, checkpoint.read), tensor, piece_bytes)
    stored = checkpoint.read_fp8(tensor.name)
    values = _source(tensor, checkpoint, E4M3, lambda name: stored.values)
    scales = ConvertedArray(stored.scales, stored.scales.dtype)
    return [
        *_split(values, tensor.num_bytes, tensor.offset, piece_bytes),
        *_split(scales, tensor.scale_bytes, tensor.scale_offset, piece_bytes),
    ]


def _source(
    tensor: StoredTensor, checkpoint: Checkpoint, dtype: np.dtype[Any], read: Callable[[str], Array]
) -> ByteSource:
    """The tensor's file if it holds this type; otherwise what ``read`` gives, converted."""
    in_file = checkpoint.in_file(tensor.name)
    found = in_file if in_file is not None and in_file.dtype == dtype else read(tensor.name)
    if found.shape != tensor.shape:
        raise ValueError(f"{tensor.name} has shape {found.shape}, planned was {tensor.shape}")
    return found if isinstance(found, FileTensor) else ConvertedArray(found, dtype)


def _split(source: ByteSource, num_bytes: int, offset: int, piece_bytes: int) -> list[Piece]:
    return [
        Piece(source, start, min(piece_bytes, num_bytes - start), offset + start)
        for start in range(0, num_bytes, piece_bytes)
    ]


def _split_rows(source: ByteSource, tensor: StoredTensor, piece_bytes: int) -> list[Piece]:
    """Pieces of whole rows, which the device rounds."""
    num_rows, columns = tensor.shape
    row_bytes = columns * NUMPY_TYPES[tensor.dtype].itemsize
    step = piece_bytes // row_bytes
    pieces = []
    for first in range(0, num_rows, step):
        rows = tensor.rows(first, min(step, num_rows - first))
        pieces.append(Piece(source, first * row_bytes, rows.num_rows * row_bytes, rows))
    return pieces
