"""Errors of the CUDA driver, whose own texts need a driver."""

from __future__ import annotations

from engine_runtime.cuda import CudaError


def cuda_error(name: str, *, is_fatal: bool) -> CudaError:
    """As the driver would cause it."""
    error = CudaError.__new__(CudaError, name)
    error.name, error.is_fatal = name, is_fatal
    return error
