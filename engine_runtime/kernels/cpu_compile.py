"""How the CPU kernels are compiled: without the GIL, and once for all starts of the daemon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function with numba: no GIL, no bounds checks, IEEE arithmetic, code kept on disk."""
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
