"""ONNX Runtime through its C interface.

The Python package gives a session operators of our own only from a compiled library. The C interface takes
them as tables of function pointers, and numba makes such functions. So the shared library that the
``onnxruntime`` wheel carries is loaded here with ctypes, and the Python module is never imported.

The interface is one struct of function pointers, to which new ones are only ever appended
(``onnxruntime_c_api.h``): a position in it never changes its meaning.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

API_VERSION = 17  # the first that has KernelContext_ParallelFor

_OUT = POINTER(c_void_p)

# name: (position in the struct, argument types). Each returns an OrtStatus*, null if all went well.
_CALLS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "CreateEnv": (3, (c_int, c_char_p, _OUT)),
    "CreateSessionFromArray": (8, (c_void_p, c_char_p, c_size_t, c_void_p, _OUT)),
    "CreateSessionOptions": (10, (_OUT,)),
    "EnableProfiling": (14, (c_void_p, c_char_p)),
    "DisableMemPattern": (17, (c_void_p,)),
    "SetSessionGraphOptimizationLevel": (23, (c_void_p, c_int)),
    "SetIntraOpNumThreads": (24, (c_void_p, c_int)),
    "CreateCustomOpDomain": (26, (c_char_p, _OUT)),
    "CustomOpDomain_Add": (27, (c_void_p, c_void_p)),
    "AddCustomOpDomain": (28, (c_void_p, c_void_p)),
    "CreateTensorWithDataAsOrtValue": (
        49,
        (c_void_p, c_void_p, c_size_t, POINTER(c_int64), c_size_t, c_int, _OUT),
    ),
    "CreateCpuMemoryInfo": (69, (c_int, c_int, _OUT)),
    "GetAllocatorWithDefaultOptions": (78, (_OUT,)),
    "KernelInfoGetAttribute_int64": (86, (c_void_p, c_char_p, POINTER(c_int64))),
    "SessionEndProfiling": (110, (c_void_p, c_void_p, _OUT)),
    "AddSessionConfigEntry": (130, (c_void_p, c_char_p, c_char_p)),
    "RunWithBinding": (133, (c_void_p, c_void_p, c_void_p)),
    "CreateIoBinding": (134, (c_void_p, _OUT)),
    "BindInput": (136, (c_void_p, c_char_p, c_void_p)),
    "BindOutput": (137, (c_void_p, c_char_p, c_void_p)),
    "AddExternalInitializers": (210, (c_void_p, POINTER(c_char_p), _OUT, c_size_t)),
}

# name: position in the struct. Each takes one pointer and returns nothing.
_RELEASES = {
    "ReleaseEnv": 92,
    "ReleaseStatus": 93,
    "ReleaseMemoryInfo": 94,
    "ReleaseSession": 95,
    "ReleaseValue": 96,
    "ReleaseSessionOptions": 100,
    "ReleaseCustomOpDomain": 101,
    "ReleaseIoBinding": 135,
}

# Called by operators while a graph runs, by address.
_KERNEL_CALLS = {
    "KernelContext_GetInput": 90,
    "KernelContext_GetOutput": 91,
    "GetTensorMutableData": 51,
    "KernelContext_ParallelFor": 274,
}


class OnnxRuntimeError(RuntimeError):
    """ONNX Runtime refused a graph or failed while it ran one."""


class OrtApi:
    """The functions of ONNX Runtime that we use. One instance a process: ``ort_api()``."""

    def __init__(self, library: Path) -> None:
        """Loads the shared library; raises OnnxRuntimeError if it is too old."""
        loaded = ctypes.CDLL(str(library))
        loaded.OrtGetApiBase.restype = c_void_p
        base = (c_void_p * 2).from_address(loaded.OrtGetApiBase())
        assert base[0] is not None
        assert base[1] is not None
        self.version = ctypes.CFUNCTYPE(c_char_p)(base[1])().decode()
        table = ctypes.CFUNCTYPE(c_void_p, c_uint32)(base[0])(API_VERSION)
        if not table:
            raise OnnxRuntimeError(
                f"onnxruntime {self.version} is too old: 1.{API_VERSION} or later is needed"
            )
        size = 1 + max(position for position, _ in _CALLS.values())
        addresses = (c_void_p * max(size, 1 + max(_KERNEL_CALLS.values()))).from_address(table)
        self._calls = {
            name: ctypes.CFUNCTYPE(c_void_p, *arguments)(addresses[position] or 0)
            for name, (position, arguments) in _CALLS.items()
        }
        self._releases = {
            name: ctypes.CFUNCTYPE(None, c_void_p)(addresses[position] or 0)
            for name, position in _RELEASES.items()
        }
        self._message = ctypes.CFUNCTYPE(c_char_p, c_void_p)(addresses[2] or 0)
        self.kernel_calls: dict[str, int] = {
            name: addresses[position] or 0 for name, position in _KERNEL_CALLS.items()
        }
        self.environment = self.create("CreateEnv", 3, b"inflightd")  # 3: log errors only
        self.cpu_memory = self.create("CreateCpuMemoryInfo", 0, 0)  # device allocator, default memory
        self.allocator = self.create("GetAllocatorWithDefaultOptions")

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function; raises OnnxRuntimeError with the runtime's message if it fails."""
        status = self._calls[name](*arguments)
        if status:
            message = self._message(status).decode(errors="replace")
            self._releases["ReleaseStatus"](status)
            raise OnnxRuntimeError(message)

    def create(self, name: str, *arguments: Any) -> int:
        """Calls a function whose last argument receives a new object; returns its address."""
        created = c_void_p()
        self.call(name, *arguments, byref(created))
        return created.value or 0

    def release(self, name: str, address: int) -> None:
        self._releases[name](address)


@cache
def ort_api() -> OrtApi:
    """Loads the library of the installed ``onnxruntime`` package, once, with its telemetry off.

    Raises:
        OnnxRuntimeError: it is not installed, carries no library or is too old.
    """
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        raise OnnxRuntimeError("the package onnxruntime is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "capi"
    for pattern in ("libonnxruntime.so.*", "libonnxruntime.*dylib", "onnxruntime.dll"):
        for library in sorted(folder.glob(pattern)):
            # Since 1.29 it reports to Microsoft and keeps a device id, unless it is told before it starts.
            os.environ["ORT_DISABLE_TELEMETRY"] = "1"
            return OrtApi(library)
    raise OnnxRuntimeError(f"no ONNX Runtime library in {folder}")
