"""Operators of our own inside ONNX Runtime: numba kernels behind the C interface of custom operators.

A node's work is one or more kernels in sequence, each split into tasks that run on the session's own threads.
What a kernel needs is kept in the node's state, an int64 array that the node's attribute ``node`` selects;
the addresses of inputs and outputs are filled in at each run. How many rows and tasks there are is read from
the *step record*, one int64 array that all nodes share and that the executor fills in before a run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from engine_runtime.executors.onnxruntime.native_call import (
    call_2,
    call_2_status,
    call_3_status,
    call_5_status,
    load_int64,
    store_int64,
)
from engine_runtime.executors.onnxruntime.ort_api import ort_api
from engine_runtime.executors.onnxruntime.ort_session import ELEMENT_TYPES

DOMAIN = "inflightd"
MAX_KERNELS = 4
MAX_ADDRESSES = 8

# Words of a node's state.
_API = 0
_NUM_INPUTS = 1
_NUM_OUTPUTS = 2
_STEP = 3
_ROWS = 4  # where in the step record: number of rows, rows of a task
_NUM_KERNELS = 5
_KERNELS = 6
_TASKS = _KERNELS + MAX_KERNELS  # where in the step record each kernel finds its number of tasks
_COLUMNS = _TASKS + MAX_KERNELS  # of each output; 0 for one that is a vector
_SLOT = _COLUMNS + MAX_ADDRESSES
_DIMS = _SLOT + 1
_ARGUMENTS = _DIMS + 2

# Words of a kernel's arguments.
ROWS = 0
SHARE = 1
SCRATCH = 2
SCRATCH_STRIDE = 3
COLUMNS = 4
CONSTANT = 5
ROTATION = 6
ADDRESSES = 7
EXTRA = ADDRESSES + MAX_ADDRESSES


def _compute(state: int, context: int) -> int:
    """Runs one node; returns an OrtStatus*, null if all went well."""
    api = load_int64(state, _API)
    get_input = load_int64(api, 0)
    get_output = load_int64(api, 1)
    get_data = load_int64(api, 2)
    parallel_for = load_int64(api, 3)
    slot = state + 8 * _SLOT
    dims = state + 8 * _DIMS
    arguments = state + 8 * _ARGUMENTS
    step = load_int64(state, _STEP)
    rows = load_int64(step, load_int64(state, _ROWS))
    store_int64(arguments, ROWS, rows)
    store_int64(arguments, SHARE, load_int64(step, load_int64(state, _ROWS) + 1))
    num_inputs = load_int64(state, _NUM_INPUTS)
    for i in range(num_inputs):
        status: int = call_3_status(get_input, context, i, slot)
        if status == 0:
            status = call_2_status(get_data, load_int64(slot, 0), slot)
        if status != 0:
            return status
        store_int64(arguments, ADDRESSES + i, load_int64(slot, 0))
    for i in range(load_int64(state, _NUM_OUTPUTS)):
        columns = load_int64(state, _COLUMNS + i)
        store_int64(dims, 0, rows)
        store_int64(dims, 1, columns)
        status = call_5_status(get_output, context, i, dims, 1 if columns == 0 else 2, slot)
        if status == 0:
            status = call_2_status(get_data, load_int64(slot, 0), slot)
        if status != 0:
            return status
        store_int64(arguments, ADDRESSES + num_inputs + i, load_int64(slot, 0))
    if rows == 0:
        return 0
    for i in range(load_int64(state, _NUM_KERNELS)):
        kernel = load_int64(state, _KERNELS + i)
        tasks = load_int64(step, load_int64(state, _TASKS + i))
        if tasks == 1:
            call_2(kernel, arguments, 0)
        else:
            status = call_5_status(parallel_for, context, kernel, tasks, 0, arguments)
            if status != 0:
                return status
    return 0


@cache
def _compiled_compute() -> Any:
    return numba.cfunc(numba.int64(numba.int64, numba.int64), nopython=True, cache=True)(_compute)


class _OrtCustomOp(ctypes.Structure):
    """``OrtCustomOp`` of onnxruntime_c_api.h, as of version 16."""

    _fields_ = [
        ("version", c_uint32),
        ("CreateKernel", c_void_p),
        ("GetName", ctypes.CFUNCTYPE(c_void_p, c_void_p)),
        ("GetExecutionProviderType", ctypes.CFUNCTYPE(c_void_p, c_void_p)),
        ("GetInputType", ctypes.CFUNCTYPE(c_int, c_void_p, c_size_t)),
        ("GetInputTypeCount", ctypes.CFUNCTYPE(c_size_t, c_void_p)),
        ("GetOutputType", ctypes.CFUNCTYPE(c_int, c_void_p, c_size_t)),
        ("GetOutputTypeCount", ctypes.CFUNCTYPE(c_size_t, c_void_p)),
        ("KernelCompute", c_void_p),
        ("KernelDestroy", ctypes.CFUNCTYPE(None, c_void_p)),
        ("GetInputCharacteristic", ctypes.CFUNCTYPE(c_int, c_void_p, c_size_t)),
        ("GetOutputCharacteristic", ctypes.CFUNCTYPE(c_int, c_void_p, c_size_t)),
        ("GetInputMemoryType", ctypes.CFUNCTYPE(c_int, c_void_p, c_size_t)),
        ("GetVariadicInputMinArity", c_void_p),
        ("GetVariadicInputHomogeneity", c_void_p),
        ("GetVariadicOutputMinArity", c_void_p),
        ("GetVariadicOutputHomogeneity", c_void_p),
        (
            "CreateKernelV2",
            ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_void_p, ctypes.POINTER(c_void_p)),
        ),
        ("KernelComputeV2", c_void_p),
        ("InferOutputShapeFn", c_void_p),
    ]


@dataclass(frozen=True)
class Operator:
    """The signature of an operator.

    Attributes:
        inputs: element types.
        outputs: element types.
    """

    name: str
    inputs: tuple[npt.DTypeLike, ...]
    outputs: tuple[npt.DTypeLike, ...]


class OperatorTable:
    """The operators of one session and the state of its nodes. Must live as long as the session."""

    def __init__(self, step: npt.NDArray[np.int64]) -> None:
        """``step`` is the step record that all nodes read."""
        self.step = step
        self._calls = np.array(
            [
                ort_api().kernel_calls[name]
                for name in (
                    "KernelContext_GetInput",
                    "KernelContext_GetOutput",
                    "GetTensorMutableData",
                    "KernelContext_ParallelFor",
                )
            ],
            np.int64,
        )
        self._states: list[npt.NDArray[np.int64]] = []
        self._kept: list[Any] = []

    def add_node(
        self,
        *,
        rows: int,
        kernels: Sequence[tuple[int, int]],
        num_inputs: int,
        output_columns: Sequence[int],
        columns: int,
        constant: float = 0.0,
        rotation: int = 1,
        scratch: tuple[int, int] = (0, 0),
        extra: Sequence[int] = (),
    ) -> int:
        """Makes the state of one node.

        Args:
            rows: position in the step record of the number of rows, followed by the rows of a task.
            kernels: (address, position in the step record of the number of tasks) of each kernel.
            output_columns: of each output; 0 for one that has a number a row.
            columns, constant, rotation: passed to the kernels.
            scratch: address of the first task's scratch memory, and bytes from one task's to the next.
            extra: further words of the kernels' arguments.

        Returns:
            The value of the node's attribute ``node``.
        """
        state = np.zeros(_ARGUMENTS + EXTRA + len(extra), np.int64)
        state[_API] = self._calls.ctypes.data
        state[_NUM_INPUTS] = num_inputs
        state[_NUM_OUTPUTS] = len(output_columns)
        state[_STEP] = self.step.ctypes.data
        state[_ROWS] = rows
        state[_NUM_KERNELS] = len(kernels)
        for i, (address, tasks) in enumerate(kernels):
            state[_KERNELS + i] = address
            state[_TASKS + i] = tasks
        state[_COLUMNS : _COLUMNS + len(output_columns)] = output_columns
        arguments = state[_ARGUMENTS:]
        arguments[SCRATCH], arguments[SCRATCH_STRIDE] = scratch
        arguments[COLUMNS] = columns
        arguments[CONSTANT : CONSTANT + 1].view(np.float32)[0] = constant
        arguments[ROTATION] = rotation
        arguments[EXTRA:] = extra
        self._states.append(state)
        return len(self._states) - 1

    def build(self, operator: Operator) -> int:
        """Makes the ``OrtCustomOp`` of an operator; returns its address."""
        api = ort_api()
        name = ctypes.create_string_buffer(operator.name.encode())
        inputs = [ELEMENT_TYPES[np.dtype(kind)] for kind in operator.inputs]
        outputs = [ELEMENT_TYPES[np.dtype(kind)] for kind in operator.outputs]

        def create(_op: int, _api: int, info: int, kernel: Any) -> int | None:
            node = c_int64()
            api.call("KernelInfoGetAttribute_int64", info, b"node", ctypes.byref(node))
            kernel[0] = self._states[node.value].ctypes.data
            return None

        types = {field[0]: field[1] for field in _OrtCustomOp._fields_}

        def function(field: str, body: Any) -> Any:
            return types[field](body)

        table = _OrtCustomOp(
            version=16,
            GetName=function("GetName", lambda _: ctypes.addressof(name)),
            GetExecutionProviderType=function("GetExecutionProviderType", lambda _: None),
            GetInputType=function("GetInputType", lambda _, i: inputs[i]),
            GetInputTypeCount=function("GetInputTypeCount", lambda _: len(inputs)),
            GetOutputType=function("GetOutputType", lambda _, i: outputs[i]),
            GetOutputTypeCount=function("GetOutputTypeCount", lambda _: len(outputs)),
            KernelDestroy=function("KernelDestroy", lambda _: None),
            GetInputCharacteristic=function("GetInputCharacteristic", lambda *_: 0),
            GetOutputCharacteristic=function("GetOutputCharacteristic", lambda *_: 0),
            GetInputMemoryType=function("GetInputMemoryType", lambda *_: 0),
            CreateKernelV2=function("CreateKernelV2", create),
            KernelComputeV2=_compiled_compute().address,
        )
        self._kept += [name, table]
        return ctypes.addressof(table)


@cache
def compiled(kernel: Any) -> Any:
    """The C function ``void (int64 arguments, int64 task)`` of a kernel; ``.address`` is where it is."""
    signature = numba.void(numba.int64, numba.int64)
    return numba.cfunc(signature, nopython=True, cache=True, error_model="numpy")(kernel)
