"""What a format of weights must offer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class TensorSource(Protocol):
    """Named tensors in files that stay mapped until ``close``.

    Attributes:
        shapes: of every tensor, by its canonical name (that of the Hugging Face checkpoint).
        num_bytes: of all tensors as stored.
        fingerprint: hexadecimal; other weights have another one. Cheap: contents are not read.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as float32, float16 or bfloat16 (ml_dtypes), read-only where it is a view."""
        ...

    def close(self) -> None: ...


def stored_floats(data: NDArray[np.uint8], dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Bytes of a file as an array, without a copy if they are aligned."""
    if data.ctypes.data % dtype.itemsize:
        data = data.copy()
    return data.view(dtype).reshape(shape)
