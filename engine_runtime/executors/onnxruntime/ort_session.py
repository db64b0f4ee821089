"""A session of ONNX Runtime: one graph with its weights, run over buffers that are bound by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import c_char_p, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from engine_runtime.executors.onnxruntime.ort_api import OrtApi, ort_api

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
            initializers: a C-contiguous array for each of those names. The session reads this memory as long
            as it
                lives, except that of matrices that it packs anew (``packs_matrices``).
            operators: addresses of ``OrtCustomOp`` tables, which must stay valid as long as the session.
            domain: the ONNX domain of ``operators``.
            num_threads: the calling thread and ``num_threads - 1`` more. They spin while a run lasts and
            sleep
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


@cache
def packs_matrices() -> bool:
    """Whether this build of ONNX Runtime copies the constant matrices of a product into an order of its own.

    It does so on all processors it has fast kernels for; then our copy can be freed once a session is built.
    Found out by changing a matrix behind the back of a session.
    """
    columns = 32
    matrices: dict[str, npt.NDArray[Any]] = {
        "floats": np.ones((columns, columns), np.float32),
        "integers": np.ones((columns, columns), np.int8),
    }
    inputs: dict[str, npt.NDArray[Any]] = {
        "x": np.ones((2, columns), np.float32),
        "q": np.ones((2, columns), np.uint8),
    }
    outputs: dict[str, npt.NDArray[Any]] = {
        "y": np.zeros((2, columns), np.float32),
        "sums": np.zeros((2, columns), np.int32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "floats"], ["y"]),
            helper.make_node("MatMulInteger", ["q", "integers"], ["sums"]),
        ],
        "probe",
        [_value_info(name, array) for name, array in inputs.items()],
        [_value_info(name, array) for name, array in outputs.items()],
        [external_initializer(name, array.dtype, array.shape) for name, array in matrices.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = OrtSession(model.SerializeToString(), matrices, [], "probe", num_threads=1)
    try:
        for name, array in inputs.items():
            session.bind_input(name, array)
        for name, array in outputs.items():
            session.bind_output(name, array)
        for matrix in matrices.values():
            matrix[...] = 0
        session.run()
    finally:
        session.close()
    return all(bool((array == columns).all()) for array in outputs.values())


def external_initializer(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> onnx.TensorProto:
    """An initializer whose data is handed to ``OrtSession``, not stored in the model."""
    tensor = onnx.TensorProto(name=name, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    tensor.data_type = ELEMENT_TYPES[dtype]
    tensor.external_data.add(key="location", value="memory")
    return tensor


def _value_info(name: str, array: npt.NDArray[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENT_TYPES[array.dtype], array.shape)
