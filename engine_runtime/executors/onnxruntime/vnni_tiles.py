"""VNNI for numba: products of a few rows with 16 columns of int8, as fast as memory delivers these.

One instruction multiplies 4 neighbours of a row, uint8, with 4 of a column and adds the products to a 32-bit
sum, in 8 or 16 columns at once, without saturating. Weights lie in memory as ``packed_weights`` has them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from engine_runtime.executors.onnxruntime.native_call import native, pointer_to
from engine_runtime.kernels.cpu_simd import INT32, INT64, LANES, has_feature

DEPTH = 4  # neighbours that one instruction multiplies and adds
STEP = 16  # columns of x for each turn of the inner loop
MAX_ROWS = 8  # of one pass: their sums stay in registers
_PREFETCH = 8192  # bytes ahead, into the second-level cache

# AVX-512 adds 16 lanes at once. The same instruction for 8 lanes came to smaller processors as AVX-VNNI.
_LANES = 16 if has_feature("avx512vnni") else 8
_PIECES = LANES // _LANES
_REGISTER = ir.VectorType(INT32, _LANES)
_BYTE = ir.IntType(8)


def has_vnni() -> bool:
    """Whether this processor has the instruction."""
    return has_feature("avx512vnni") or has_feature("avxvnni")


def _load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    return builder.load(pointer_to(builder, address, kind), typ=kind, align=align)


def _prefetch(builder: Any, address: Any) -> None:
    signature = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(function, [pointer_to(builder, address, _BYTE), INT32(0), INT32(2), INT32(1)])


def _multiply_add(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """total + left * right: uint8 times int8, 4 neighbours of each lane added up."""
    signature = ir.FunctionType(_REGISTER, [_REGISTER] * 3)
    name = f"llvm.x86.avx512.vpdpbusd.{32 * _LANES}"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [total, left, right])


@native
def product_tile(
    typing_context: Any,
    num_rows: Any,
    x: Any,
    x_stride: Any,
    tile: Any,
    num_steps: Any,
    end: Any,
    jump: Any,
    sums: Any,
    sums_stride: Any,
) -> Any:
    """sums[row, lane] = offset[lane] + sum over k of x[row, k] * w[lane, k], for 16 lanes.

    ``num_rows`` is 1..8; x is uint8 with rows of ``x_stride`` bytes; sums are int32 with rows of
    ``sums_stride`` bytes; k goes to ``16 * num_steps``. At ``tile`` lie 16 offsets, int32, and then for each
    4 of k the weights of all lanes. What lies ``_PREFETCH`` bytes ahead is asked for, and beyond ``end`` what
    lies ``jump`` bytes further on.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row_count, x_first, x_step, tile_first, step_count, end, jump = arguments[:7]
        sums_first, sums_step = arguments[7:]
        zeros = ir.Constant(_REGISTER, [INT32(0)] * _LANES)
        undefined = ir.Constant(_REGISTER, ir.Undefined)
        first_weight = builder.add(tile_first, INT64(4 * LANES))

        def rows_from(first: Any, stride: Any, rows: int) -> list[Any]:
            return [builder.add(first, builder.mul(INT64(row), stride)) for row in range(rows)]

        def emit(rows: int) -> None:
            # Several sums for each row and piece, so that an addition does not wait for the one before.
            chains = 4 if rows == 1 else 2
            totals = [
                [[cgutils.alloca_once(builder, _REGISTER) for _ in range(chains)] for _ in range(_PIECES)]
                for _ in range(rows)
            ]
            for row in totals:
                for n, chain in enumerate(row):
                    offset = builder.add(tile_first, INT64(4 * _LANES * n))
                    builder.store(_load(builder, offset, _REGISTER, 4), chain[0])
                    for total in chain[1:]:
                        builder.store(zeros, total)
            x_rows = rows_from(x_first, x_step, rows)
            with cgutils.for_range(builder, step_count) as loop:
                weights = builder.add(first_weight, builder.mul(loop.index, INT64(STEP * LANES)))
                column = builder.mul(loop.index, INT64(STEP))
                ahead = builder.add(weights, INT64(_PREFETCH))
                is_beyond = builder.icmp_unsigned(">=", ahead, end)
                ahead = builder.select(is_beyond, builder.add(ahead, jump), ahead)
                for k in range(STEP // DEPTH):
                    address = builder.add(weights, INT64(DEPTH * LANES * k))
                    _prefetch(builder, builder.add(ahead, INT64(DEPTH * LANES * k)))
                    right = [
                        _load(builder, builder.add(address, INT64(4 * _LANES * n)), _REGISTER, 4)
                        for n in range(_PIECES)
                    ]
                    for row, x_row in zip(totals, x_rows, strict=True):
                        four = builder.add(builder.add(x_row, column), INT64(DEPTH * k))
                        lane = builder.insert_element(undefined, _load(builder, four, INT32, 1), INT32(0))
                        left = builder.shuffle_vector(lane, undefined, zeros)
                        for chain, piece in zip(row, right, strict=True):
                            total = chain[k % chains]
                            builder.store(_multiply_add(builder, builder.load(total), left, piece), total)
            for row, target in zip(totals, rows_from(sums_first, sums_step, rows), strict=True):
                for n, chain in enumerate(row):
                    result = builder.load(chain[0])
                    for total in chain[1:]:
                        result = builder.add(result, builder.load(total))
                    place = builder.add(target, INT64(4 * _LANES * n))
                    builder.store(result, pointer_to(builder, place, _REGISTER), align=4)

        done = builder.append_basic_block("product.done")
        switch = builder.switch(row_count, done)
        for rows in range(1, MAX_ROWS + 1):
            block = builder.append_basic_block(f"product.{rows}")
            switch.add_case(INT64(rows), block)
            builder.position_at_end(block)
            emit(rows)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), generate
