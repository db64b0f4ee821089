"""What the row kernels need beside ``cpu_simd``: conversions, magnitudes, a Hadamard transform of 16 lanes.

``address`` is that of element 0 and ``offset`` counts elements, as everywhere unchecked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from engine_runtime.executors.onnxruntime.native_call import native, pointer_to
from engine_runtime.kernels.cpu_simd import INT32, INT_VECTOR, LANES, VECTOR, constant_vector, float32x16

_FLOAT = ir.FloatType()
_BYTE = ir.IntType(8)
_BYTE_VECTOR = ir.VectorType(_BYTE, LANES)


def _at(builder: Any, address: Any, offset: Any, element: Any) -> Any:
    return builder.gep(pointer_to(builder, address, element), [offset], source_etype=element)


def _vector_at(builder: Any, address: Any, offset: Any, element: Any) -> Any:
    pointer = _at(builder, address, offset, element)
    return builder.bitcast(pointer, ir.PointerType(ir.VectorType(element, LANES)))


def _integers(value: int) -> Any:
    return ir.Constant(INT_VECTOR, [INT32(value)] * LANES)


@native
def load_integers(typing_context: Any, address: Any, offset: Any) -> Any:
    """16 int32, converted to float."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integers = builder.load(
            _vector_at(builder, arguments[0], arguments[1], INT32), typ=INT_VECTOR, align=4
        )
        return builder.sitofp(integers, VECTOR)

    return float32x16(types.int64, types.int64), generate


@native
def max_abs(typing_context: Any, largest: Any, vector: Any) -> Any:
    """The larger of ``largest`` and ``|vector|`` in each lane; a NaN in either wins.

    Without its sign bit a float orders like the integer of the same bits, and NaN above all numbers.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.bitcast(arguments[0], INT_VECTOR)
        second = builder.and_(builder.bitcast(arguments[1], INT_VECTOR), _integers(0x7FFFFFFF))
        larger = builder.select(builder.icmp_signed(">", first, second), first, second)
        return builder.bitcast(larger, VECTOR)

    return float32x16(float32x16, float32x16), generate


@native
def max_abs_lanes(typing_context: Any, vector: Any) -> Any:
    """The largest lane of a vector without negative lanes; NaN wins."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], INT_VECTOR)
        for width in (8, 4, 2, 1):
            undefined = ir.Constant(ir.VectorType(INT32, 2 * width), ir.Undefined)
            mask = ir.VectorType(INT32, width)
            low = builder.shuffle_vector(bits, undefined, ir.Constant(mask, [INT32(i) for i in range(width)]))
            high = builder.shuffle_vector(
                bits, undefined, ir.Constant(mask, [INT32(i + width) for i in range(width)])
            )
            bits = builder.select(builder.icmp_signed(">", low, high), low, high)
        return builder.bitcast(builder.extract_element(bits, INT32(0)), _FLOAT)

    return types.float32(float32x16), generate


@native
def minimum(typing_context: Any, a: Any, b: Any) -> Any:
    """``a`` where a < b, else ``b``: one instruction. Where either is NaN this is ``b``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second = arguments
        return builder.select(builder.fcmp_ordered("<", first, second), first, second)

    return float32x16(float32x16, float32x16), generate


# 1.5 * 2**23: a float this large has no fraction bits, so adding it rounds to the nearest integer, halves to
# even, and leaves that integer in the low bits. 128 more is the zero point of the quantized rows.
_ROUND = 12582912.0
_ZERO_POINT = 128.0


@native
def store_bytes(typing_context: Any, address: Any, offset: Any, vector: Any) -> Any:
    """Rounds 16 numbers from -128 to 127, adds 128 and stores them as uint8."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        shifted = builder.fadd(arguments[2], constant_vector(_ROUND + _ZERO_POINT))
        low_bytes = builder.trunc(builder.bitcast(shifted, INT_VECTOR), _BYTE_VECTOR)
        builder.store(low_bytes, _vector_at(builder, arguments[0], arguments[1], _BYTE), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, float32x16), generate


@native
def hadamard_lanes(typing_context: Any, vector: Any) -> Any:
    """The Hadamard transform of 16 lanes, not normalized: four rounds of sums and differences of pairs."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        undefined = ir.Constant(VECTOR, ir.Undefined)
        for bit in (1, 2, 4, 8):
            partners = ir.Constant(INT_VECTOR, [INT32(lane ^ bit) for lane in range(LANES)])
            signs = ir.Constant(VECTOR, [_FLOAT(-1.0 if lane & bit else 1.0) for lane in range(LANES)])
            swapped = builder.shuffle_vector(value, undefined, partners)
            value = builder.fadd(swapped, builder.fmul(value, signs))
        return value

    return float32x16(float32x16), generate
