"""How the CPU kernels are compiled: without the GIL, and once for all starts of the daemon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def kernel(function: _Function) -> _Function:
    """Compiles a function with numba: no GIL, no bounds checks, IEEE arithmetic, machine code kept on disk."""
    return cast(_Function, numba.njit(nogil=True, cache=True, error_model="numpy")(function))
