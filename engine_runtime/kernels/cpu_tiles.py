"""The two matrix products of attention, on tiles that stay in registers.

    scores = q @ K^T      [rows, d] x [d, keys]     K is stored transposed within a block: d rows of keys
    output += p @ V       [rows, keys] x [keys, d]

Both broadcast one element of the left matrix and multiply it with vectors of the right one, as BLAS kernels
do. A tile of 6 rows and 4 vectors of 16 floats uses 24 of the 32 registers of AVX-512; processors with 16
registers of 8 floats get tiles of one vector. An element of a product is always the same chain of
multiply-adds over the shared dimension, whatever the tile, so the result of a row does not depend on the
rows it is computed with.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from engine_runtime.kernels.cpu_simd import (
    INT32,
    INT64,
    LANES,
    VECTOR,
    element_pointer,
    fused_multiply_add,
    has_feature,
    load_vector,
    memory_pointer,
    memory_type,
    operation,
    splat_vector,
    store_vector,
)

MAX_ROWS = 6
PREFETCHING_ROWS = 4


VECTOR_COUNTS = (4, 2, 1) if has_feature("avx512f") else (1,)
MAX_VECTORS = VECTOR_COUNTS[0]


def _multiply_add_step(
    builder: Any, sums: list[list[Any]], left: list[Any], right: list[Any], left_offset: Any
) -> None:
    """sums[row][n] += left[row][left_offset] * right[n], for one step of the shared dimension."""
    vectors = [load_vector(builder, pointer) for pointer in right]
    for row_sums, row in zip(sums, left, strict=True):
        factor = splat_vector(builder, builder.load(element_pointer(builder, row, left_offset), align=4))
        for total, vector in zip(row_sums, vectors, strict=True):
            builder.store(fused_multiply_add(builder, factor, vector, builder.load(total)), total)


def _switch_on_shape(builder: Any, rows: Any, vectors: Any, emit: Any) -> None:
    """Calls ``emit(rows, vectors)`` for each tile shape and jumps to the right one at run time."""
    done = builder.append_basic_block("tile.done")
    key = builder.add(builder.mul(rows, INT64(8)), vectors)
    switch = builder.switch(key, done)
    for row_count in range(1, MAX_ROWS + 1):
        for vector_count in VECTOR_COUNTS:
            block = builder.append_basic_block(f"tile.{row_count}x{vector_count}")
            switch.add_case(INT64(8 * row_count + vector_count), block)
            builder.position_at_end(block)
            emit(row_count, vector_count)
            builder.branch(done)
    builder.position_at_end(done)


def _row_pointers(builder: Any, base: Any, offset: Any, stride: Any, rows: int) -> list[Any]:
    first = element_pointer(builder, base, offset)
    return [element_pointer(builder, first, builder.mul(INT64(row), stride)) for row in range(rows)]


def _block_address(
    builder: Any, cache: Any, table: Any, block_index: Any, block_stride: Any, offset: Any
) -> Any:
    """The address of what lies at ``offset`` in a sequence's block number ``block_index``."""
    block = builder.load(element_pointer(builder, table, block_index), align=4)
    return element_pointer(
        builder, cache, builder.add(builder.mul(builder.sext(block, INT64), block_stride), offset)
    )


def _prefetch(builder: Any, pointer: Any) -> None:
    """Asks for a line of memory, for the second-level cache."""
    byte_pointer = ir.IntType(8).as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [byte_pointer, INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(pointer, byte_pointer), INT32(0), INT32(2), INT32(1)])


def _table_pointer(context: Any, builder: Any, table_type: Any, table: Any, offset: Any) -> Any:
    data = context.make_array(table_type)(context, builder, value=table).data
    return element_pointer(builder, data, offset)


def _check_table(block_table: Any) -> Any:
    if not (isinstance(block_table, types.Array) and block_table.dtype == types.int32):
        raise TypeError(f"block tables must be int32, not {block_table}")
    return block_table


@operation
def scores_tile(
    typing_context: Any,
    rows: Any,
    vectors: Any,
    q: Any,
    q_offset: Any,
    q_stride: Any,
    depth: Any,
    cache: Any,
    key_offset: Any,
    block_stride: Any,
    block_size: Any,
    block_table: Any,
    table_offset: Any,
    first_key: Any,
    end: Any,
    value_offset: Any,
    value_stride: Any,
    scores: Any,
    scores_offset: Any,
    scores_stride: Any,
) -> Any:
    """scores[row, i] = sum over c < depth of q[row, c] * K^T[c, first_key + i], for i < 16 * vectors.

    ``rows`` is 1..6, ``vectors`` one of ``VECTOR_COUNTS``, ``first_key`` a multiple of 16. Key i of a
    sequence is in ``block_table[table_offset + i // block_size]``, where K^T [depth, block_size] begins at
    ``key_offset``.

    A tile of few rows, as in decoding, waits for memory: it prefetches the values of its keys, which begin at
    ``value_offset`` with rows of ``value_stride``, and the next keys if they are before ``end``.
    """
    integer = types.int64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row_count, vector_count, _, q_first, q_step, k_count, _, k_first, b_step, b_size = arguments[:10]
        table_first, key, end, v_first, v_step, _, s_first, s_step = arguments[11:]
        q_base = memory_pointer(context, builder, signature.args[2], arguments[2])
        cache_base = memory_pointer(context, builder, signature.args[6], arguments[6])
        table = _table_pointer(context, builder, signature.args[10], arguments[10], table_first)
        s_base = memory_pointer(context, builder, signature.args[16], arguments[16])

        def locate(vector_key: Any, offset: Any, stride: Any) -> Any:
            """The address of a key's part of its block, which begins at ``offset``."""
            slot = builder.urem(vector_key, b_size)
            block_index = builder.udiv(vector_key, b_size)
            start = builder.add(offset, builder.mul(slot, stride))
            return _block_address(builder, cache_base, table, block_index, b_step, start)

        def emit(rows: int, vectors: int) -> None:
            sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(rows)]
            for total in (total for row in sums for total in row):
                builder.store(ir.Constant(VECTOR, None), total)
            left = _row_pointers(builder, q_base, q_first, q_step, rows)
            starts, values, next_keys = [], [], []
            for n in range(vectors):
                vector_key = builder.add(key, INT64(LANES * n))
                starts.append(locate(vector_key, k_first, INT64(1)))
                if rows <= PREFETCHING_ROWS:
                    next_key = builder.add(vector_key, INT64(LANES * vectors))
                    is_inside = builder.icmp_signed("<", next_key, end)
                    next_keys.append(locate(builder.select(is_inside, next_key, key), k_first, INT64(1)))
                    values.append(locate(vector_key, v_first, v_step))
            with cgutils.for_range(builder, k_count) as loop:
                row_of_keys = builder.mul(loop.index, b_size)
                right = [element_pointer(builder, start, row_of_keys) for start in starts]
                for pointer in next_keys:
                    _prefetch(builder, element_pointer(builder, pointer, row_of_keys))
                for pointer in values:
                    row_of_values = builder.mul(loop.index, INT64(LANES))
                    _prefetch(builder, element_pointer(builder, pointer, row_of_values))
                _multiply_add_step(builder, sums, left, right, loop.index)
            for row, target in zip(sums, _row_pointers(builder, s_base, s_first, s_step, rows), strict=True):
                for n, total in enumerate(row):
                    store_vector(
                        builder, builder.load(total), element_pointer(builder, target, INT64(LANES * n))
                    )

        _switch_on_shape(builder, row_count, vector_count, emit)
        return context.get_dummy_value()

    signature = types.void(
        integer, integer, memory_type(q), integer, integer, integer, memory_type(cache), integer, integer,
        integer, _check_table(block_table), integer, integer, integer, integer, integer,
        memory_type(scores), integer, integer,
    )  # fmt: skip
    return signature, generate


@operation
def values_tile(
    typing_context: Any,
    rows: Any,
    vectors: Any,
    p: Any,
    p_offset: Any,
    p_stride: Any,
    num_keys: Any,
    cache: Any,
    value_offset: Any,
    value_stride: Any,
    block_stride: Any,
    block_size: Any,
    block_table: Any,
    table_offset: Any,
    output: Any,
    output_offset: Any,
    output_stride: Any,
) -> Any:
    """output[row, 16 n + lane] += sum over i < num_keys of p[row, i] * V[i, 16 n + lane], in order of i.

    V[i] is at ``block_table[table_offset + i // block_size] * block_stride + value_offset + (i % block_size)
    * value_stride``; the block table is int32, in elements of its flat array.
    """
    integer = types.int64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row_count, vector_count, _, p_first, p_step, key_count, _, v_first, v_step, b_step, b_size = (
            arguments[:11]
        )
        o_first, o_step = arguments[14:]
        p_base = memory_pointer(context, builder, signature.args[2], arguments[2])
        cache_base = memory_pointer(context, builder, signature.args[6], arguments[6])
        table = _table_pointer(context, builder, signature.args[11], arguments[11], arguments[12])
        o_base = memory_pointer(context, builder, signature.args[13], arguments[13])
        last = builder.sub(builder.add(key_count, b_size), INT64(1))
        num_blocks = builder.sdiv(last, b_size)

        def emit(rows: int, vectors: int) -> None:
            sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(rows)]
            targets = [
                [element_pointer(builder, target, INT64(LANES * n)) for n in range(vectors)]
                for target in _row_pointers(builder, o_base, o_first, o_step, rows)
            ]
            pairs = [
                pair for row, row_targets in zip(sums, targets, strict=True)
                for pair in zip(row, row_targets, strict=True)
            ]  # fmt: skip
            for total, target in pairs:
                builder.store(load_vector(builder, target), total)
            left = _row_pointers(builder, p_base, p_first, p_step, rows)
            with cgutils.for_range(builder, num_blocks) as blocks:
                block_values = _block_address(builder, cache_base, table, blocks.index, b_step, v_first)
                first_key = builder.mul(blocks.index, b_size)
                remaining = builder.sub(key_count, first_key)
                count = builder.select(builder.icmp_signed("<", remaining, b_size), remaining, b_size)
                with cgutils.for_range(builder, count) as loop:
                    row_of_values = element_pointer(builder, block_values, builder.mul(loop.index, v_step))
                    right = [
                        element_pointer(builder, row_of_values, INT64(LANES * n)) for n in range(vectors)
                    ]
                    _multiply_add_step(builder, sums, left, right, builder.add(first_key, loop.index))
            for total, target in pairs:
                store_vector(builder, builder.load(total), target)

        _switch_on_shape(builder, row_count, vector_count, emit)
        return context.get_dummy_value()

    signature = types.void(
        integer, integer, memory_type(p), integer, integer, integer, memory_type(cache), integer, integer,
        integer, integer, _check_table(block_table), integer, memory_type(output), integer, integer,
    )  # fmt: skip
    return signature, generate
