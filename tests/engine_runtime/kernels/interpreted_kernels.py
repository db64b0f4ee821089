"""Triton kernels on a CPU, behind the same faces as the compiled ones: addresses of host memory, by position.

Only for processes in which TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter

from engine_runtime.kernels.kernel_spec import KernelSpec

_TYPES = {
    "bf16": tl.bfloat16,
    "fp16": tl.float16,
    "fp32": tl.float32,
    "fp64": tl.float64,
    "i64": tl.int64,
    "i32": tl.int32,
    "i16": tl.int16,
    "fp8e4nv": tl.float8e4nv,
}

_patch_tensor = interpreter._patch_lang_tensor
_multiply = interpreter.InterpreterBuilder.create_dot


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    """numpy 2.4 converts arrays of rank 0 only to integers; the interpreter's scalars have rank 1."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter multiplies the bits of bfloat16 as integers; here it converts them first."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
    return _multiply(self, a, b, *rest)


interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter._patch_lang_tensor = _patch_tensor_and_index
# Once and for all: each launch, and each call in a kernel, would look through the whole language again.
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


class InterpretedKernel:
    """Takes the place of ``Kernel``."""

    def __init__(self, spec: KernelSpec) -> None:
        self._spec = spec
        self.constexprs = spec.constexprs

    def launch(self, grid: tuple[int, int, int], stream: Any, *args: Any) -> None:
        names = [name for name in self._spec.function.arg_names if name not in self.constexprs]
        values = {name: self._convert(name, arg) for name, arg in zip(names, args, strict=True)}
        with np.errstate(all="ignore"):
            self._spec.function[grid](**values, **self.constexprs)

    launch_early = launch

    def _convert(self, name: str, arg: Any) -> Any:
        kind = self._spec.signature[name].partition(":")[0]
        if not kind.startswith("*"):
            return arg
        pointer = tl.pointer_type(_TYPES[kind[1:]])
        return tl.tensor(interpreter.TensorHandle(np.array([arg], np.uint64), pointer), pointer)


class InterpretedLibrary:
    """The kernels of an architecture without tensor maps, which the interpreter does not take by address."""

    def __init__(self, specs: Sequence[KernelSpec], architecture: int = 80) -> None:
        self._specs = {spec.name: spec for spec in specs if architecture in spec.architectures}

    @property
    def names(self) -> list[str]:
        return list(self._specs)

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def get(self, name: str) -> InterpretedKernel:
        return InterpretedKernel(self._specs[name])


@triton.jit
def halves_of_pairs(pairs):  # type: ignore[no-untyped-def]
    """What the PTX of ``attention_layout`` does, which cannot be interpreted."""
    low = ((pairs & 0x80) << 8) | ((pairs & 0x7F) << 7)
    high = (pairs & -32768) | ((pairs & 0x7F00) >> 1)
    return low.to(tl.int16).to(tl.float16, bitcast=True), high.to(tl.int16).to(tl.float16, bitcast=True)


class HostStream:
    handle = 0

    def fill(self, destination: int, byte: int, num_bytes: int) -> None:
        ctypes.memset(destination, byte, num_bytes)


class HostMemory:
    """``Memory`` for kernels that are interpreted; it keeps all that was put there."""

    def __init__(self) -> None:
        self.stream = HostStream()
        self._buffers: list[npt.NDArray[np.uint8]] = []

    def put(self, array: npt.NDArray[Any]) -> int:
        buffer = np.full(array.nbytes + 256, 0xFF, np.uint8)
        start = -buffer.ctypes.data % 256
        buffer[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        self._buffers.append(buffer)
        return int(buffer.ctypes.data) + start

    def get(self, address: int, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.frombuffer(ctypes.string_at(address, like.nbytes), like.dtype).reshape(like.shape)
