"""The quantized operators of a segment, a row of tokens at a time.

A row is quantized on its own: ``scale = max |x| / 127`` and ``x = scale * (q - 128)`` with q in uint8. So the integers
that enter a matrix product, whose sums are exact, never depend on the other rows of the batch.

Each kernel is called as ``kernel(arguments, task)``, where ``arguments`` is the address of an int64 array; ``operators``
names its words. Columns are multiples of 16.
"""

from __future__ import annotations

import numpy as np

from engine_runtime.executors.native_call import load_int64
from engine_runtime.executors.operators import (
    ADDRESSES,
    COLUMNS,
    CONSTANT,
    ROWS,
    SCRATCH,
    SCRATCH_STRIDE,
    SHARE,
)
from engine_runtime.executors.row_vectors import (
    divide,
    load_float,
    load_floats,
    load_integers,
    max_abs,
    max_abs_lanes,
    minimum,
    store_bytes,
    store_float,
    store_floats,
)
from engine_runtime.kernels.cpu_compile import kernel
from engine_runtime.kernels.cpu_simd import LANES, add, exp2, maximum, multiply, splat, sum_lanes

ZERO = np.float32(0.0)
ONE = np.float32(1.0)
LARGEST = np.float32(127.0)
LOG2_E = np.float32(1.4426950408889634)


@kernel
def rows_of_task(arguments: int, task: int) -> tuple[int, int]:
    rows = load_int64(arguments, ROWS)
    share = load_int64(arguments, SHARE)
    return task * share, min((task + 1) * share, rows)


@kernel
def _store_row(
    source: int, offset: int, columns: int, largest: float, target: int, target_offset: int
) -> None:
    """Quantizes floats whose largest magnitude is known."""
    inverse = LARGEST / largest if largest > ZERO else ZERO
    factor = splat(inverse)
    for c in range(0, columns, LANES):
        store_bytes(target, target_offset + c, multiply(load_floats(source, offset + c), factor))


@kernel
def quantize_row_range(x: int, q: int, scale: int, columns: int, first: int, last: int) -> None:
    for row in range(first, last):
        largest = splat(ZERO)
        for c in range(0, columns, LANES):
            largest = max_abs(largest, load_floats(x, row * columns + c))
        bound = max_abs_lanes(largest)
        _store_row(x, row * columns, columns, bound, q, row * columns)
        store_float(scale, row, bound / LARGEST)


@kernel
def dequantize_rows(
    sums: int, scale: int, column_scale: int, y: int, columns: int, first: int, last: int
) -> None:
    for row in range(first, last):
        factor = splat(load_float(scale, row))
        for c in range(0, columns, LANES):
            value = multiply(load_integers(sums, row * columns + c), load_floats(column_scale, c))
            store_floats(y, row * columns + c, multiply(value, factor))


def quantize_rows(arguments: int, task: int) -> None:
    """x float32 [rows, columns] -> q uint8 [rows, columns], scale float32 [rows]."""
    first, last = rows_of_task(arguments, task)
    quantize_row_range(
        load_int64(arguments, ADDRESSES),
        load_int64(arguments, ADDRESSES + 1),
        load_int64(arguments, ADDRESSES + 2),
        load_int64(arguments, COLUMNS),
        first,
        last,
    )


def dequantize(arguments: int, task: int) -> None:
    """sums int32 [rows, columns], scale [rows], column_scale [columns] -> float32 [rows, columns]."""
    first, last = rows_of_task(arguments, task)
    dequantize_rows(
        load_int64(arguments, ADDRESSES),
        load_int64(arguments, ADDRESSES + 1),
        load_int64(arguments, ADDRESSES + 2),
        load_int64(arguments, ADDRESSES + 3),
        load_int64(arguments, COLUMNS),
        first,
        last,
    )


def swiglu_quantize(arguments: int, task: int) -> None:
    """sums int32 [rows, 2 columns], scale, column_scale -> silu(gate) * up, quantized as by ``quantize_rows``."""
    first, last = rows_of_task(arguments, task)
    columns = load_int64(arguments, COLUMNS)
    h = load_int64(arguments, SCRATCH) + task * load_int64(arguments, SCRATCH_STRIDE)
    sums = load_int64(arguments, ADDRESSES)
    scale = load_int64(arguments, ADDRESSES + 1)
    column_scale = load_int64(arguments, ADDRESSES + 2)
    q = load_int64(arguments, ADDRESSES + 3)
    scale_out = load_int64(arguments, ADDRESSES + 4)
    one = splat(ONE)
    exponent = splat(-LOG2_E)
    lowest = splat(np.float32(-126.0))
    highest = splat(np.float32(126.0))
    for row in range(first, last):
        factor = splat(load_float(scale, row))
        largest = splat(ZERO)
        gates = 2 * row * columns
        ups = gates + columns
        for c in range(0, columns, LANES):
            gate = multiply(multiply(load_integers(sums, gates + c), load_floats(column_scale, c)), factor)
            up = multiply(
                multiply(load_integers(sums, ups + c), load_floats(column_scale, columns + c)), factor
            )
            power = minimum(maximum(multiply(gate, exponent), lowest), highest)
            value = multiply(divide(gate, add(one, exp2(power))), up)
            largest = max_abs(largest, value)
            store_floats(h, c, value)
        bound = max_abs_lanes(largest)
        _store_row(h, 0, columns, bound, q, row * columns)
        store_float(scale_out, row, bound / LARGEST)


def add_rms_norm_quantize(arguments: int, task: int) -> None:
    """sums, scale, column_scale, residual, norm weight -> residual + product, and its RMSNorm, quantized.

    The normalisation multiplies a whole row by one number, which is left to the row's scale.
    """
    first, last = rows_of_task(arguments, task)
    columns = load_int64(arguments, COLUMNS)
    epsilon = load_float(arguments, 2 * CONSTANT)
    weighted = load_int64(arguments, SCRATCH) + task * load_int64(arguments, SCRATCH_STRIDE)
    sums = load_int64(arguments, ADDRESSES)
    scale = load_int64(arguments, ADDRESSES + 1)
    column_scale = load_int64(arguments, ADDRESSES + 2)
    residual = load_int64(arguments, ADDRESSES + 3)
    weight = load_int64(arguments, ADDRESSES + 4)
    residual_out = load_int64(arguments, ADDRESSES + 5)
    q = load_int64(arguments, ADDRESSES + 6)
    scale_out = load_int64(arguments, ADDRESSES + 7)
    for row in range(first, last):
        factor = splat(load_float(scale, row))
        largest = splat(ZERO)
        squares = splat(ZERO)
        offset = row * columns
        for c in range(0, columns, LANES):
            product = multiply(load_integers(sums, offset + c), load_floats(column_scale, c))
            total = add(load_floats(residual, offset + c), multiply(product, factor))
            store_floats(residual_out, offset + c, total)
            squares = add(squares, multiply(total, total))
            scaled = multiply(total, load_floats(weight, c))
            largest = max_abs(largest, scaled)
            store_floats(weighted, c, scaled)
        bound = max_abs_lanes(largest)
        _store_row(weighted, 0, columns, bound, q, offset)
        mean = sum_lanes(squares) / np.float32(columns)
        store_float(scale_out, row, bound / (LARGEST * np.sqrt(mean + epsilon)))
