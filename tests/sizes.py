"""How much a test does: little in the suite, all of it with ``INFLIGHTD_FULL_SIZES=1``."""

from __future__ import annotations

import os
import resource


def size(in_suite: int, full: int) -> int:
    """``full`` if the environment asks for full sizes; then this process may open as many files as it can."""
    if not os.environ.get("INFLIGHTD_FULL_SIZES"):
        return in_suite
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return full
