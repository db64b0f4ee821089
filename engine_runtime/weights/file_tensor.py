"""Tensors that lie in a file as they are, read without mapping the file.

To read into memory that is there already costs no page faults, and a file that is cut off or cannot be read
is an error like any other; through a mapping the system would end the process.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine_runtime.weights.errors import CheckpointError


class OpenFile:
    """A file that several threads may read at once, at any place; closed at the latest with this object."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """
        Args:
            path: for messages.
            descriptor: of the file, open for reading; belongs to this object from now on.
        """
        self._path = path
        self._descriptor = descriptor
        self._finalize = weakref.finalize(self, os.close, descriptor)

    def read_into(self, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fills ``buffer`` with the bytes from ``offset`` on. Lets other threads run meanwhile.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        view, done = buffer.data, 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self._path}: {error.strerror or error}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self._path} has become shorter since it was opened: nothing is left at byte "
                    f"{offset + done}. Let the download or copy finish, then start again"
                )
            done += count

    def close(self) -> None:
        """Further reading raises ``CheckpointError``."""
        self._descriptor = -1
        self._finalize()


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor whose bytes lie in a file, in C order and little-endian.

    Attributes:
        offset: of the first byte.
    """

    file: OpenFile
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def read_into(self, start: int, buffer: NDArray[np.uint8]) -> None:
        """Fills ``buffer`` with the tensor's bytes from ``start`` on. May be called from several threads.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        self.file.read_into(self.offset + start, buffer)
