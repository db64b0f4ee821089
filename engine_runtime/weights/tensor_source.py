"""What a format of weights must offer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine_runtime.weights.file_tensor import FileTensor
from engine_runtime.weights.fp8_tensor import Fp8Tensor


class TensorSource(Protocol):
    """Named tensors in files that stay open until ``close``.

    Attributes:
        shapes: of every tensor, by its canonical name (that of the Hugging Face checkpoint).
        num_bytes: of all tensors as stored.
        fingerprint: hexadecimal; other weights have another one. Cheap: contents are not read.
        fp8_names: of the tensors that are stored in E4M3.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def fp8_names(self) -> Collection[str]: ...

    def read_fp8(self, name: str) -> Fp8Tensor:
        """A tensor among ``fp8_names`` as it is stored."""
        ...

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as float32, float16 or bfloat16 (ml_dtypes), read-only where it is a view."""
        ...

    def in_file(self, name: str) -> FileTensor | None:
        """Where the values of ``read`` lie, or those of ``read_fp8``; None if only ``read`` gives them."""
        ...

    def close(self) -> None: ...


def stored_floats(data: NDArray[np.uint8], dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Bytes of a file as an array, without a copy if they are aligned."""
    if data.ctypes.data % dtype.itemsize:
        data = data.copy()
    return data.view(dtype).reshape(shape)
