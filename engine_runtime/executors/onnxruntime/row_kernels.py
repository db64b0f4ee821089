"""The quantized operators of a segment, a row of tokens at a time.

A row is quantized on its own: ``scale = max |x| / 127`` and ``x = scale * (q - 128)`` with q in uint8. So the
integers that enter a matrix product, whose sums are exact, never depend on the other rows of the batch.

Before that it is rotated: a Hadamard transform of each 2**n neighbours spreads an outlier over all of them,
where it would otherwise take most of the 8 bits (QuaRot, arXiv:2404.00456). The weights that the row is
multiplied with hold the inverse, so that the product stays the same.

Each kernel is called as ``kernel(arguments, task)``, where ``arguments`` is the address of an int64 array;
``operators`` names its words. Columns are multiples of 16.
"""

from __future__ import annotations

import numpy as np

from engine_runtime.executors.onnxruntime.native_call import load_int64
from engine_runtime.executors.onnxruntime.operators import (
    ADDRESSES,
    COLUMNS,
    CONSTANT,
    ROTATION,
    ROWS,
    SCRATCH,
    SCRATCH_STRIDE,
    SHARE,
)
from engine_runtime.executors.onnxruntime.row_vectors import (
    hadamard_lanes,
    load_integers,
    max_abs,
    max_abs_lanes,
    minimum,
    store_bytes,
)
from engine_runtime.kernels.cpu_compile import kernel
from engine_runtime.kernels.cpu_simd import (
    LANES,
    Float32x16,
    add,
    divide,
    exp2,
    load,
    load_scalar,
    maximum,
    multiply,
    splat,
    store,
    store_scalar,
    subtract,
    sum_lanes,
)

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
def scratch_of_task(arguments: int, task: int) -> int:
    address: int = load_int64(arguments, SCRATCH) + task * load_int64(arguments, SCRATCH_STRIDE)
    return address


@kernel
def rotate_row(x: int, offset: int, columns: int, rotation: int, y: int) -> None:
    """x to y[0:], each ``rotation`` neighbours Hadamard transformed: 2**n from 16 on, or 1 for none."""
    if rotation < LANES:
        for c in range(0, columns, LANES):
            store(y, c, load(x, offset + c))
        return
    for c in range(0, columns, LANES):
        store(y, c, hadamard_lanes(load(x, offset + c)))
    width = LANES
    while 4 * width <= rotation:
        for start in range(0, columns, 4 * width):
            for c in range(start, start + width, LANES):
                v0 = load(y, c)
                v1 = load(y, c + width)
                v2 = load(y, c + 2 * width)
                v3 = load(y, c + 3 * width)
                s0 = add(v0, v1)
                s1 = subtract(v0, v1)
                s2 = add(v2, v3)
                s3 = subtract(v2, v3)
                store(y, c, add(s0, s2))
                store(y, c + width, add(s1, s3))
                store(y, c + 2 * width, subtract(s0, s2))
                store(y, c + 3 * width, subtract(s1, s3))
        width *= 4
    if width < rotation:
        for start in range(0, columns, 2 * width):
            for c in range(start, start + width, LANES):
                v0 = load(y, c)
                v1 = load(y, c + width)
                store(y, c, add(v0, v1))
                store(y, c + width, subtract(v0, v1))


@kernel
def _quantize(x: int, columns: int, q: int, offset: int) -> float:
    """Quantizes x[0:columns] to q[offset:]; returns the largest magnitude, NaN if there is a NaN."""
    largest = splat(ZERO)
    for c in range(0, columns, LANES):
        largest = max_abs(largest, load(x, c))
    bound: float = max_abs_lanes(largest)
    factor = splat(LARGEST / bound if bound > ZERO else ZERO)
    for c in range(0, columns, LANES):
        store_bytes(q, offset + c, multiply(load(x, c), factor))
    return bound


@kernel
def quantize_row_range(
    x: int, q: int, scale: int, scratch: int, columns: int, rotation: int, first: int, last: int
) -> None:
    """Rows ``first`` to ``last - 1`` of x; ``scratch`` holds one row."""
    for row in range(first, last):
        rotate_row(x, row * columns, columns, rotation, scratch)
        bound = _quantize(scratch, columns, q, row * columns)
        store_scalar(scale, row, bound / LARGEST)


@kernel
def dequantize_rows(
    sums: int, scale: int, column_scale: int, y: int, columns: int, first: int, last: int
) -> None:
    for row in range(first, last):
        factor = splat(load_scalar(scale, row))
        for c in range(0, columns, LANES):
            value = multiply(load_integers(sums, row * columns + c), load(column_scale, c))
            store(y, row * columns + c, multiply(value, factor))


def quantize_rows(arguments: int, task: int) -> None:
    """x float32 [rows, columns] -> q uint8 [rows, columns], scale float32 [rows]."""
    first, last = rows_of_task(arguments, task)
    quantize_row_range(
        load_int64(arguments, ADDRESSES),
        load_int64(arguments, ADDRESSES + 1),
        load_int64(arguments, ADDRESSES + 2),
        scratch_of_task(arguments, task),
        load_int64(arguments, COLUMNS),
        load_int64(arguments, ROTATION),
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


@kernel
def swiglu(gate: Float32x16, up: Float32x16) -> Float32x16:
    """silu(gate) * up in 16 lanes."""
    power = multiply(gate, splat(-LOG2_E))
    power = minimum(maximum(power, splat(np.float32(-126.0))), splat(np.float32(126.0)))
    result: Float32x16 = multiply(divide(gate, add(splat(ONE), exp2(power))), up)
    return result


def swiglu_quantize(arguments: int, task: int) -> None:
    """sums int32 [rows, 2 columns], scale, column_scale -> silu(gate) * up, quantized."""
    first, last = rows_of_task(arguments, task)
    columns = load_int64(arguments, COLUMNS)
    rotation = load_int64(arguments, ROTATION)
    h = scratch_of_task(arguments, task)
    sums = load_int64(arguments, ADDRESSES)
    scale = load_int64(arguments, ADDRESSES + 1)
    column_scale = load_int64(arguments, ADDRESSES + 2)
    q = load_int64(arguments, ADDRESSES + 3)
    scale_out = load_int64(arguments, ADDRESSES + 4)
    for row in range(first, last):
        factor = splat(load_scalar(scale, row))
        gates = 2 * row * columns
        ups = gates + columns
        for c in range(0, columns, LANES):
            gate = multiply(multiply(load_integers(sums, gates + c), load(column_scale, c)), factor)
            up = multiply(multiply(load_integers(sums, ups + c), load(column_scale, columns + c)), factor)
            store(h, c, swiglu(gate, up))
        rotate_row(h, 0, columns, rotation, h)
        bound = _quantize(h, columns, q, row * columns)
        store_scalar(scale_out, row, bound / LARGEST)


def add_rms_norm_quantize(arguments: int, task: int) -> None:
    """sums, scale, column_scale, residual, norm weight -> residual + product, and its RMSNorm, quantized.

    The normalisation multiplies a whole row by one number, which is left to the row's scale.
    """
    first, last = rows_of_task(arguments, task)
    columns = load_int64(arguments, COLUMNS)
    rotation = load_int64(arguments, ROTATION)
    epsilon = load_scalar(arguments, 2 * CONSTANT)
    weighted = scratch_of_task(arguments, task)
    sums = load_int64(arguments, ADDRESSES)
    scale = load_int64(arguments, ADDRESSES + 1)
    column_scale = load_int64(arguments, ADDRESSES + 2)
    residual = load_int64(arguments, ADDRESSES + 3)
    weight = load_int64(arguments, ADDRESSES + 4)
    residual_out = load_int64(arguments, ADDRESSES + 5)
    q = load_int64(arguments, ADDRESSES + 6)
    scale_out = load_int64(arguments, ADDRESSES + 7)
    for row in range(first, last):
        factor = splat(load_scalar(scale, row))
        squares = splat(ZERO)
        offset = row * columns
        for c in range(0, columns, LANES):
            product = multiply(load_integers(sums, offset + c), load(column_scale, c))
            total = add(load(residual, offset + c), multiply(product, factor))
            store(residual_out, offset + c, total)
            squares = add(squares, multiply(total, total))
            store(weighted, c, multiply(total, load(weight, c)))
        rotate_row(weighted, 0, columns, rotation, weighted)
        bound = _quantize(weighted, columns, q, offset)
        mean = sum_lanes(squares) / np.float32(columns)
        store_scalar(scale_out, row, bound / (LARGEST * np.sqrt(mean + epsilon)))
