"""A session of ONNX Runtime: one graph with its weights, run over buffers that are bound by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from engine_runtime.executors.ort_api import OrtApi, ort_api

# ONNX's numbers for tensor element types (onnx.proto, TensorProto.DataType).
ELEMENT_TYPES: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): 1,
    np.dtype(np.uint8): 2,
    np.dtype(np.int8): 3,
    np.dtype(np.int32): 6,
    np.dtype(np.int64): 7,
    np.dtype(np.float16): 10,
    np.dtype(ml_dtypes.bfloat16): 16,
}

_ALL_OPTIMIZATIONS = 99


def _tensor(array: npt.NDArray[Any]) -> int:
    """An OrtValue over the memory of a C-contiguous array."""
    api = ort_api()
    dims = (c_int64 * array.ndim)(*array.shape)
    kind = ELEMENT_TYPES[array.dtype]
    return api.create(
        "CreateTensorWithDataAsOrtValue",
        api.cpu_memory,
        array.ctypes.data,
        array.nbytes,
        dims,
        array.ndim,
        kind,
    )


class OrtSession:
    """A graph that is ready to run. Not thread-safe; one run at a time."""

    def __init__(
        self,
        model: bytes,
        initializers: Mapping[str, npt.NDArray[Any]],
        operators: Sequence[int],
        domain: str,
        *,
        num_threads: int,
        profile_prefix: Path | None = None,
    ) -> None:
        """Compiles a graph.

        Args:
            model: a serialized ModelProto whose initializers name external data; the data is never looked up.
            initializers: a C-contiguous array for each of those names. The session reads this memory as long as it
                lives, except that of matrices that it packs anew (``packs_weights``).
            operators: addresses of ``OrtCustomOp`` tables, which must stay valid as long as the session.
            domain: the ONNX domain of ``operators``.
            num_threads: the calling thread and ``num_threads - 1`` more. They spin while a run lasts and sleep
                between runs.
            profile_prefix: writes a trace of every run to a file that starts so, on ``close``.

        Raises:
            OnnxRuntimeError: the graph is not valid.
        """
        api = ort_api()
        self._api: OrtApi = api
        self._profiles = profile_prefix is not None
        self._bound: dict[str, npt.NDArray[Any]] = {}  # keeps the memory alive
        self._session = 0
        self._binding = 0
        options = api.create("CreateSessionOptions")
        self._domain = api.create("CreateCustomOpDomain", domain.encode())
        try:
            api.call("SetIntraOpNumThreads", options, num_threads)
            api.call("SetSessionGraphOptimizationLevel", options, _ALL_OPTIMIZATIONS)
            api.call(
                "DisableMemPattern", options
            )  # patterns are kept for each shape; ours change at each step
            api.call("AddSessionConfigEntry", options, b"session.force_spinning_stop", b"1")
            if profile_prefix is not None:
                api.call("EnableProfiling", options, str(profile_prefix).encode())
            for operator in operators:
                api.call("CustomOpDomain_Add", self._domain, operator)
            api.call("AddCustomOpDomain", options, self._domain)
            if initializers:
                names = (c_char_p * len(initializers))(*(name.encode() for name in initializers))
                values = [_tensor(array) for array in initializers.values()]
                addresses = (c_void_p * len(values))(*values)
                api.call("AddExternalInitializers", options, names, addresses, len(values))
                for value in values:
                    api.release("ReleaseValue", value)
            self._session = api.create("CreateSessionFromArray", api.environment, model, len(model), options)
            self._binding = api.create("CreateIoBinding", self._session)
        finally:
            api.release("ReleaseSessionOptions", options)

    def bind_input(self, name: str, array: npt.NDArray[Any]) -> None:
        """Reads input ``name`` from this C-contiguous array at each run, until it is bound again."""
        self._bind("BindInput", name, array)

    def bind_output(self, name: str, array: npt.NDArray[Any]) -> None:
        """Writes output ``name`` to this C-contiguous array at each run, until it is bound again."""
        self._bind("BindOutput", name, array)

    def _bind(self, function: str, name: str, array: npt.NDArray[Any]) -> None:
        value = _tensor(array)
        try:
            self._api.call(function, self._binding, name.encode(), value)
        finally:
            self._api.release("ReleaseValue", value)  # the binding holds its own reference
        self._bound[name] = array

    def run(self) -> None:
        """Runs the graph once.

        Raises:
            OnnxRuntimeError: an operator failed. The session can be run again.
        """
        self._api.call("RunWithBinding", self._session, None, self._binding)

    def close(self) -> None:
        """Frees the session and its weights."""
        if self._session and self._profiles:
            self._api.create("SessionEndProfiling", self._session, self._api.allocator)
        if self._binding:
            self._api.release("ReleaseIoBinding", self._binding)
        if self._session:
            self._api.release("ReleaseSession", self._session)
        if self._domain:
            self._api.release("ReleaseCustomOpDomain", self._domain)
        self._binding = self._session = self._domain = 0
