"""Whether there is a GPU to test on."""

from __future__ import annotations

import pytest


def _reason_against() -> str | None:
    try:
        from cuda.bindings import driver

        code, count = driver.cuInit(0)[0], 0
        if code == driver.CUresult.CUDA_SUCCESS:
            count = driver.cuDeviceGetCount()[1]
    except Exception as error:  # no bindings, or no driver for them to load
        return f"no NVIDIA driver: {error}"
    return None if count else "no NVIDIA GPU"


_reason = _reason_against()
skip_without_gpu = pytest.mark.skipif(_reason is not None, reason=_reason or "")
