"""Raw memory and C functions for numba code: what an operator inside ONNX Runtime is written with.

Addresses are int64. Nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

native: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic
"""Decorates a function that emits LLVM code; the result is called from numba code."""

_INT64 = ir.IntType(64)
_BYTE_POINTER = ir.PointerType(ir.IntType(8))


def pointer_to(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(element))


@native
def load_int64(typing_context: Any, address: Any, index: Any) -> Any:
    """Element ``index`` of the int64 array at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = pointer_to(builder, arguments[0], _INT64)
        return builder.load(builder.gep(base, [arguments[1]], source_etype=_INT64), typ=_INT64)

    return types.int64(types.int64, types.int64), generate


@native
def store_int64(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = pointer_to(builder, arguments[0], _INT64)
        builder.store(arguments[2], builder.gep(base, [arguments[1]], source_etype=_INT64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _call_intrinsic(num_arguments: int, returns: bool) -> Any:
    """A C function at an address, of 64-bit arguments; its result is 64 bits wide or ignored."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result = _INT64 if returns else ir.VoidType()
        function_type = ir.FunctionType(result, [_INT64] * num_arguments)
        value = builder.call(pointer_to(builder, arguments[0], function_type), arguments[1:])
        return value if returns else context.get_dummy_value()

    result = types.int64 if returns else types.void
    return result(*[types.int64] * (num_arguments + 1)), generate


@native
def call_2(typing_context: Any, function: Any, a: Any, b: Any) -> Any:
    """Calls ``void function(int64, int64)``."""
    return _call_intrinsic(2, returns=False)


@native
def call_2_status(typing_context: Any, function: Any, a: Any, b: Any) -> Any:
    """Calls ``int64 function(int64, int64)``."""
    return _call_intrinsic(2, returns=True)


@native
def call_3_status(typing_context: Any, function: Any, a: Any, b: Any, c: Any) -> Any:
    return _call_intrinsic(3, returns=True)


@native
def call_5_status(typing_context: Any, function: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    return _call_intrinsic(5, returns=True)


@native
def void_pointer(typing_context: Any, address: Any) -> Any:
    """The address as numba's ``voidptr``, which ``carray`` turns into an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _BYTE_POINTER)

    return types.voidptr(types.int64), generate
