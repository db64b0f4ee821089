"""Reads .safetensors files, which anybody may have written.

Format: 8 bytes header length N (little-endian), N bytes of JSON {name: {dtype, shape, data_offsets}}, data.
The data must be covered without gaps or overlaps. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine_runtime.weights.errors import CheckpointError
from engine_runtime.weights.file_tensor import FileTensor, OpenFile
from engine_runtime.weights.fp8_tensor import E4M3
from engine_runtime.weights.tensor_source import stored_floats

# The largest published shards have headers of about 200 KB.
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 50_000
_MAX_DIMENSIONS = 8

_ITEM_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_READABLE: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": E4M3,
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A memory-mapped file whose header has been checked.

    Attributes:
        num_bytes: of all tensors.
        header_digest: SHA-256 of the header.

    Raises:
        CheckpointError: the file is no safetensors file, or its header contradicts itself or the file's size.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            size = path.stat().st_size
            if size < 8:
                raise self._broken("it is shorter than a header")
            with path.open("rb") as file:
                self._data: NDArray[np.uint8] = np.memmap(file, dtype=np.uint8, mode="r")
                self._file = OpenFile(path, os.dup(file.fileno()))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        header_length = int.from_bytes(self._data[:8].tobytes(), "little")
        if header_length > MAX_HEADER_BYTES:
            raise self._broken(f"its header claims {header_length} bytes; the limit is {MAX_HEADER_BYTES}")
        self._data_start = 8 + header_length
        if self._data_start > size:
            raise self._broken(f"its header claims {header_length} bytes in a file of {size}")
        header = self._data[8 : self._data_start].tobytes()
        self.header_digest = hashlib.sha256(header).digest()
        self.num_bytes = size - self._data_start
        self._tensors = self._parse(header)
        self._check_coverage()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def type_of(self, name: str) -> str:
        """As the header spells it, such as BF16."""
        return self._tensors[name].dtype

    def read(self, name: str) -> NDArray[Any]:
        """A read-only view of the file.

        Raises:
            CheckpointError: the type of the tensor is not F32, F16, BF16 or F8_E4M3.
        """
        tensor = self._tensors[name]
        data = self._data[self._data_start + tensor.start : self._data_start + tensor.end]
        return stored_floats(data, self._readable_type(name), tensor.shape)

    def in_file(self, name: str) -> FileTensor:
        """What ``read`` gives, to be read past the mapping until ``close``.

        Raises:
            CheckpointError: as ``read``.
        """
        tensor = self._tensors[name]
        start = self._data_start + tensor.start
        return FileTensor(self._file, start, self._readable_type(name), tensor.shape)

    def close(self) -> None:
        """Gives file and mapping up; arrays that were read keep the mapping for as long as they live."""
        self._data = np.empty(0, np.uint8)
        self._file.close()

    def _readable_type(self, name: str) -> np.dtype[Any]:
        stored = self._tensors[name].dtype
        dtype = _READABLE.get(stored)
        if dtype is None:
            raise CheckpointError(
                f"{self._path}: tensor {name} has type {stored}; supported are {', '.join(_READABLE)}"
            )
        return dtype

    def _parse(self, header: bytes) -> dict[str, _Tensor]:
        try:
            entries = json.loads(header, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._broken(f"its header is no valid JSON ({error})") from error
        if not isinstance(entries, dict):
            raise self._broken("its header is no JSON object")
        entries.pop("__metadata__", None)
        if len(entries) > MAX_TENSORS:
            raise self._broken(f"it claims {len(entries)} tensors; the limit is {MAX_TENSORS}")
        return {name: self._parse_entry(name, entry) for name, entry in entries.items()}

    def _parse_entry(self, name: str, entry: object) -> _Tensor:
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]}:
                pass
            case _:
                raise self._broken(f"the header entry of tensor {name[:80]!r} is malformed")
        numbers = [*shape, start, end]
        if len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise self._broken(f"the header entry of tensor {name[:80]!r} is malformed")
        if dtype not in _ITEM_BITS:
            raise self._broken(f"tensor {name[:80]!r} has unknown type {dtype[:20]!r}")
        if not start <= end <= self.num_bytes:
            raise self._broken(f"tensor {name[:80]!r} lies outside the file; is the download complete?")
        if math.prod(shape) * _ITEM_BITS[dtype] != (end - start) * 8:
            raise self._broken(f"tensor {name[:80]!r} has {end - start} bytes for shape {shape} of {dtype}")
        return _Tensor(dtype, tuple(shape), start, end)

    def _check_coverage(self) -> None:
        end = 0
        for name, tensor in sorted(self._tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if tensor.start != end:
                raise self._broken(f"tensor {name[:80]!r} overlaps another or follows a gap")
            end = tensor.end
        if end != self.num_bytes:
            raise self._broken(f"its tensors end at byte {end} of {self.num_bytes}")

    def _broken(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is no valid safetensors file: {reason}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result
