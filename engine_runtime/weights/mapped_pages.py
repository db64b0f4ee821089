"""Which pages of a mapped file this process holds.

Tensors that are views of a file cost a page fault for every 64 KB when they are first read, and count as the
process's memory until they are let go. Both matter when 16 GB pass by once, on their way to a GPU. The file
stays in the system's page cache either way.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Linux's numbers; the first is there from 5.14 on and not in Python's mmap.
_POPULATE_READ = 22
_DONT_NEED = 4


def populate(array: NDArray[Any]) -> None:
    """Maps all pages of the array at once, if it is a view of a file. Lets other threads run meanwhile."""
    _advise(array, _POPULATE_READ)


def release(array: NDArray[Any]) -> None:
    """Lets the pages go, if the array is a view of a file, which stays usable: reading maps them again."""
    _advise(array, _DONT_NEED)


def _advise(array: NDArray[Any], advice: int) -> None:
    if not is_mapped(array):
        return
    start = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    # Older kernels do not know every advice; nothing depends on it.
    _madvise()(start, array.ctypes.data + array.nbytes - start, advice)


def is_mapped(array: NDArray[Any]) -> bool:
    """Whether the array is a read-only view of a mapped file, so that letting its pages go loses nothing."""
    is_view = isinstance(array, np.memmap) and array.mode == "r" and not array.flags.writeable
    return is_view and sys.platform == "linux" and array.nbytes > 0 and array.flags.c_contiguous


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
