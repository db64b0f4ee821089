"""A vector of 16 floats for numba, and the operations that the CPU kernels are written in.

numba leaves vectorisation to LLVM's heuristics, which choose the order of a sum, and give up on reductions,
exponentials and register tiles. A value of the numba type ``float32x16`` is an LLVM ``<16 x float>``: one
register with AVX-512, two with AVX2. Each lane sees the same IEEE operations in the same order in every code
path, which is what makes a sequence's result independent of the batch it is computed in.

Arrays are C-contiguous, of any rank; offsets count elements of the flat array and are not checked. Elements
are float32, or float16 in arrays that numba knows as uint16: loads widen them and stores round to nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 16
STACK_FLOATS = 4096
FLOAT = ir.FloatType()
HALF = ir.HalfType()
INT32 = ir.IntType(32)
INT64 = ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
INT_VECTOR = ir.VectorType(INT32, LANES)


def has_feature(name: str) -> bool:
    """Whether numba compiles for a processor with this feature, by LLVM's name for it."""
    features = numba.config.CPU_FEATURES
    if features is not None:
        return f"+{name}" in features.split(",")
    return bool(llvm.get_host_cpu_features().get(name, False))


def operation(generator: Callable[..., Any]) -> Any:
    """A numba intrinsic: of a function (typing context, argument types) -> (signature, code generator)."""
    return intrinsic(generator)


class Float32x16(types.Type):
    """numba's name for ``<16 x float>``. Such a value lives in registers; it never reaches Python."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


float32x16 = Float32x16()


@register_model(Float32x16)
class _Float32x16Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, VECTOR)


def memory_pointer(context: Any, builder: Any, memory_type: Any, memory: Any) -> Any:
    """The float* or half* to element 0 of a numba array, or the float* to the memory at an address."""
    if not isinstance(memory_type, types.Array):
        return builder.inttoptr(memory, FLOAT.as_pointer())
    data = context.make_array(memory_type)(context, builder, value=memory).data
    return builder.bitcast(data, HALF.as_pointer()) if memory_type.dtype == types.uint16 else data


def element_pointer(builder: Any, pointer: Any, offset: Any) -> Any:
    return builder.gep(pointer, [offset])


def load_vector(builder: Any, pointer: Any) -> Any:
    """16 elements at a float* or half*, as floats."""
    vector_type = ir.VectorType(pointer.type.pointee, LANES)
    size = 2 if pointer.type.pointee == HALF else 4
    vector = builder.load(builder.bitcast(pointer, vector_type.as_pointer()), align=size)
    return vector if size == 4 else builder.fpext(vector, VECTOR)


def store_vector(builder: Any, vector: Any, pointer: Any) -> None:
    vector_type = ir.VectorType(pointer.type.pointee, LANES)
    size = 2 if pointer.type.pointee == HALF else 4
    value = vector if size == 4 else builder.fptrunc(vector, vector_type)
    builder.store(value, builder.bitcast(pointer, vector_type.as_pointer()), align=size)


def splat_vector(builder: Any, value: Any) -> Any:
    """All lanes set to one float."""
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, value, INT32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(INT_VECTOR, [INT32(0)] * LANES))


def constant_vector(value: float) -> Any:
    return ir.Constant(VECTOR, [FLOAT(value)] * LANES)


def fused_multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c: fused on every processor that has the instruction, and then always."""
    signature = ir.FunctionType(VECTOR, [VECTOR, VECTOR, VECTOR])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.fmuladd.v16f32")
    return builder.call(function, [a, b, c])


def memory_type(memory: Any) -> Any:
    """The type of an argument that names memory: a contiguous array, or an int64 address of floats."""
    if isinstance(memory, types.Integer):
        return types.int64
    is_array = isinstance(memory, types.Array) and memory.layout == "C"
    if is_array and memory.dtype in (types.float32, types.uint16):
        return memory
    raise TypeError(f"a C-contiguous array of floats or an address is needed, not {memory}")


@operation
def load(typing_context: Any, memory: Any, offset: Any) -> Any:
    """16 consecutive elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = memory_pointer(context, builder, signature.args[0], arguments[0])
        return load_vector(builder, element_pointer(builder, pointer, arguments[1]))

    return float32x16(memory_type(memory), types.int64), generate


@operation
def store(typing_context: Any, memory: Any, offset: Any, vector: Any) -> Any:
    """Writes 16 consecutive elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = memory_pointer(context, builder, signature.args[0], arguments[0])
        store_vector(builder, arguments[2], element_pointer(builder, pointer, arguments[1]))
        return context.get_dummy_value()

    return types.void(memory_type(memory), types.int64, float32x16), generate


@operation
def load_scalar(typing_context: Any, memory: Any, offset: Any) -> Any:
    """One element."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = memory_pointer(context, builder, signature.args[0], arguments[0])
        value = builder.load(element_pointer(builder, pointer, arguments[1]))
        return value if value.type == FLOAT else builder.fpext(value, FLOAT)

    return types.float32(memory_type(memory), types.int64), generate


@operation
def store_scalar(typing_context: Any, memory: Any, offset: Any, value: Any) -> Any:
    """Writes one element."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = memory_pointer(context, builder, signature.args[0], arguments[0])
        value = arguments[2] if pointer.type.pointee == FLOAT else builder.fptrunc(arguments[2], HALF)
        builder.store(value, element_pointer(builder, pointer, arguments[1]))
        return context.get_dummy_value()

    return types.void(memory_type(memory), types.int64, types.float32), generate


@operation
def address(typing_context: Any, array: Any) -> Any:
    """Where element 0 of an array is.

    A kernel passes this to another kernel instead of the array: numba counts references to arrays atomically.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, value=arguments[0]).data
        return builder.ptrtoint(data, INT64)

    return types.int64(array), generate


@operation
def splat(typing_context: Any, value: Any) -> Any:
    """All lanes equal to ``value``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return splat_vector(builder, arguments[0])

    return float32x16(types.float32), generate


@operation
def add(typing_context: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return float32x16(float32x16, float32x16), generate


@operation
def subtract(typing_context: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fsub(*arguments)

    return float32x16(float32x16, float32x16), generate


@operation
def multiply(typing_context: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fmul(*arguments)

    return float32x16(float32x16, float32x16), generate


@operation
def divide(typing_context: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fdiv(*arguments)

    return float32x16(float32x16, float32x16), generate


@operation
def at_most(typing_context: Any, vector: Any, limit: Any) -> Any:
    """Lanes above ``limit`` replaced by it. NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, bound = arguments[0], splat_vector(builder, arguments[1])
        return builder.select(builder.fcmp_ordered(">", value, bound), bound, value)

    return float32x16(float32x16, types.float32), generate


@operation
def maximum(typing_context: Any, a: Any, b: Any) -> Any:
    """``a`` where a > b, else ``b``: one instruction. Where either is NaN this is ``b``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second = arguments
        return builder.select(builder.fcmp_ordered(">", first, second), first, second)

    return float32x16(float32x16, float32x16), generate


@operation
def keep_between(typing_context: Any, vector: Any, first: Any, stop: Any, other: Any) -> Any:
    """Lanes ``first`` to ``stop - 1``, and ``other`` elsewhere; the bounds may lie outside 0..16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, low, high, fill = arguments
        lane = ir.Constant(INT_VECTOR, [INT32(i) for i in range(LANES)])
        undefined = ir.Constant(INT_VECTOR, ir.Undefined)
        zeros = ir.Constant(INT_VECTOR, [INT32(0)] * LANES)

        def spread(bound: Any) -> Any:
            first_lane = builder.insert_element(undefined, builder.trunc(bound, INT32), INT32(0))
            return builder.shuffle_vector(first_lane, undefined, zeros)

        inside = builder.and_(
            builder.icmp_signed(">=", lane, spread(low)), builder.icmp_signed("<", lane, spread(high))
        )
        return builder.select(inside, value, splat_vector(builder, fill))

    return float32x16(float32x16, types.int64, types.int64, types.float32), generate


@operation
def keep_at_least(typing_context: Any, vector: Any, threshold: Any) -> Any:
    """Lanes that are >= ``threshold``; 0 elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inside = builder.fcmp_ordered(">=", arguments[0], splat_vector(builder, arguments[1]))
        return builder.select(inside, arguments[0], constant_vector(0.0))

    return float32x16(float32x16, types.float32), generate


def _count_true(builder: Any, lanes: Any) -> Any:
    """How many of 16 booleans are set, as int64."""
    bits = builder.bitcast(lanes, ir.IntType(LANES))
    return builder.zext(builder.ctpop(bits), INT64)


@operation
def count_at_least(typing_context: Any, vector: Any, threshold: Any) -> Any:
    """The number of lanes that are >= ``threshold``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inside = builder.fcmp_ordered(">=", arguments[0], splat_vector(builder, arguments[1]))
        return _count_true(builder, inside)

    return types.int64(float32x16, types.float32), generate


@operation
def count_not_below(typing_context: Any, vector: Any, threshold: Any) -> Any:
    """The number of lanes that are NaN or >= ``threshold``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inside = builder.fcmp_unordered(">=", arguments[0], splat_vector(builder, arguments[1]))
        return _count_true(builder, inside)

    return types.int64(float32x16, types.float32), generate


@operation
def multiply_add(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return fused_multiply_add(builder, *arguments)

    return float32x16(float32x16, float32x16, float32x16), generate


@operation
def store_transposed(
    typing_context: Any,
    source: Any,
    source_offset: Any,
    source_stride: Any,
    target: Any,
    target_offset: Any,
    target_stride: Any,
) -> Any:
    """target[j, i] = source[i, j] for i and j below 16; the strides are those of rows."""
    integer = types.int64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_base = memory_pointer(context, builder, signature.args[0], arguments[0])
        target_base = memory_pointer(context, builder, signature.args[3], arguments[3])
        rows = []
        for i in range(LANES):
            offset = builder.add(arguments[1], builder.mul(INT64(i), arguments[2]))
            rows.append(load_vector(builder, element_pointer(builder, source_base, offset)))
        # Swapping each of the 4 bits of the row number with that of the column number transposes.
        for bit in (1, 2, 4, 8):
            low = [INT32(j if not j & bit else LANES + (j ^ bit)) for j in range(LANES)]
            high = [INT32(j | bit if not j & bit else LANES + j) for j in range(LANES)]
            swapped = list(rows)
            for i in range(LANES):
                if not i & bit:
                    pair = rows[i], rows[i | bit]
                    swapped[i] = builder.shuffle_vector(*pair, ir.Constant(INT_VECTOR, low))
                    swapped[i | bit] = builder.shuffle_vector(*pair, ir.Constant(INT_VECTOR, high))
            rows = swapped
        for i, row in enumerate(rows):
            offset = builder.add(arguments[4], builder.mul(INT64(i), arguments[5]))
            store_vector(builder, row, element_pointer(builder, target_base, offset))
        return context.get_dummy_value()

    return types.void(memory_type(source), integer, integer, memory_type(target), integer, integer), generate


@operation
def stack_memory(typing_context: Any) -> Any:
    """The address of room for ``STACK_FLOATS`` floats, until the kernel returns."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(FLOAT, STACK_FLOATS))
            memory.align = 64
        return builder.ptrtoint(memory, INT64)

    return types.int64(), generate


@operation
def bits_of(typing_context: Any, value: Any) -> Any:
    """The bits of a float, as int64. Positive floats order like their bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.bitcast(arguments[0], INT32), INT64)

    return types.int64(types.float32), generate


@operation
def float_of(typing_context: Any, bits: Any) -> Any:
    """The float with the low 32 bits of an integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], INT32), FLOAT)

    return types.float32(types.int64), generate


def _fold_halves(builder: Any, vector: Any, combine: Any) -> Any:
    """Combines 16 lanes to 1 in a fixed tree: lanes i and i + 8, then i + 4, i + 2, i + 1."""
    for width in (8, 4, 2, 1):
        undefined = ir.Constant(ir.VectorType(FLOAT, 2 * width), ir.Undefined)
        mask_type = ir.VectorType(INT32, width)
        low = ir.Constant(mask_type, [INT32(i) for i in range(width)])
        high = ir.Constant(mask_type, [INT32(i + width) for i in range(width)])
        vector = combine(
            builder.shuffle_vector(vector, undefined, low), builder.shuffle_vector(vector, undefined, high)
        )
    return builder.extract_element(vector, INT32(0))


@operation
def sum_lanes(typing_context: Any, vector: Any) -> Any:
    """The sum of the lanes, always added in the same order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _fold_halves(builder, arguments[0], builder.fadd)

    return types.float32(float32x16), generate


@operation
def max_lanes(typing_context: Any, vector: Any) -> Any:
    """The largest lane; NaN lanes may be lost."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _fold_halves(
            builder, arguments[0], lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b)
        )

    return types.float32(float32x16), generate


# 2**f on [-1/2, 1/2]: the polynomial of degree 6 with the least relative error (1.9e-9 before rounding).
_EXP2_COEFFICIENTS = (
    0.00015345810970757157,
    0.0013399930903688073,
    0.009618489071726799,
    0.05550328642129898,
    0.24022646248340607,
    0.6931471824645996,
    1.0,
)
_ROUND_TO_INTEGER = 12582912.0  # 1.5 * 2**23: adding it leaves an integer in the low bits of the significand


@operation
def exp2(typing_context: Any, vector: Any) -> Any:
    """2**x with a relative error below 1e-7, for x < 127; 0 below -126; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x = arguments[0]
        lowest = constant_vector(-126.0)
        underflows = builder.fcmp_ordered("<", x, lowest)
        x = builder.select(underflows, lowest, x)
        shifted = builder.fadd(x, constant_vector(_ROUND_TO_INTEGER))
        fraction = builder.fsub(x, builder.fsub(shifted, constant_vector(_ROUND_TO_INTEGER)))
        value = constant_vector(_EXP2_COEFFICIENTS[0])
        for coefficient in _EXP2_COEFFICIENTS[1:]:
            value = fused_multiply_add(builder, value, fraction, constant_vector(coefficient))
        exponent = builder.add(
            builder.bitcast(shifted, INT_VECTOR), ir.Constant(INT_VECTOR, [INT32(127)] * LANES)
        )
        power = builder.bitcast(builder.shl(exponent, ir.Constant(INT_VECTOR, [INT32(23)] * LANES)), VECTOR)
        # A multiplication, not integer arithmetic on the exponent, so that a NaN is not turned into a number.
        return builder.select(underflows, constant_vector(0.0), builder.fmul(value, power))

    return float32x16(float32x16), generate
