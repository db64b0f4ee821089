"""The matrix products of a step over packed int8 weights, with what follows a product in the same node.

Weights (``packed_weights``) are read in order, each once for 256 rows, and asked for before they are needed.
Up to 8 rows are multiplied with VNNI, more with AMX where there is AMX. Sums of integers are exact, so a row
has the same bits whichever computes it, ONNX Runtime's own product included.

    sums      x uint8 [rows, columns]                    -> (x - 128) W     int32 [rows, outputs]
    floats    x, its scale, scales of the outputs        -> y               float32 [rows, outputs]
    swiglu    the same, W being gate and up interleaved  -> silu(gate) * up float32 [rows, outputs / 2]

Two tiles of 16 outputs, a *pair*, are computed for all rows before the next: their sums go no further than
the first-level cache if floats are wanted. A task has its share of the pairs.
"""

from __future__ import annotations

from engine_runtime.executors.onnxruntime import amx_tiles
from engine_runtime.executors.onnxruntime.amx_tiles import (
    begin_tiles,
    end_tiles,
    multiply_block,
    prefetch_rows,
)
from engine_runtime.executors.onnxruntime.native_call import load_int64
from engine_runtime.executors.onnxruntime.operators import ADDRESSES, COLUMNS, EXTRA, ROWS
from engine_runtime.executors.onnxruntime.row_kernels import scratch_of_task, swiglu
from engine_runtime.executors.onnxruntime.row_vectors import load_integers
from engine_runtime.executors.onnxruntime.vnni_tiles import MAX_ROWS, STEP, product_tile
from engine_runtime.kernels.cpu_compile import kernel
from engine_runtime.kernels.cpu_simd import LANES, load, load_scalar, multiply, splat, store

# Words of the arguments after those that all kernels have.
WEIGHTS = EXTRA
OUTPUTS = EXTRA + 1
PARTS = EXTRA + 2
RESULT = EXTRA + 3  # SUMS, FLOATS or SWIGLU
LEAST_TILED = EXTRA + 4  # rows from which on AMX is used
NEXT = EXTRA + 5  # of the product that follows in a step: its weights, columns and outputs
NUM_EXTRA = 8

SUMS, FLOATS, SWIGLU = range(3)

NEVER = 1 << 40  # as LEAST_TILED
_PAIR = 2 * LANES
_ROWS_A_PASS = 256  # while they are multiplied with one pair, its weights stay in the first-level cache
_STEPS_A_PASS = 12  # of 64 columns: a block of x and a pair of tiles then fill that cache
SCRATCH_BYTES = 4 * _PAIR * _ROWS_A_PASS


def least_tiled(columns: int) -> int:
    """Rows from which on AMX multiplies a matrix of so many inputs."""
    return MAX_ROWS + 1 if amx_tiles.has_tiles() and columns % amx_tiles.DEPTH == 0 else NEVER


@kernel
def _tile_bytes(columns: int) -> int:
    return LANES * (4 + columns)


@kernel
def _first_tile(outputs: int, part: int, parts: int) -> int:
    """Where a part begins, and the one before it ends: at a pair, but for the last."""
    tiles = outputs // LANES
    pairs = (tiles + 1) // 2
    return min(2 * (pairs * part // parts), tiles)


def packed_product(arguments: int, task: int) -> None:
    """A task's share of the outputs, for all rows."""
    rows = load_int64(arguments, ROWS)
    columns = load_int64(arguments, COLUMNS)
    weights = load_int64(arguments, WEIGHTS)
    outputs = load_int64(arguments, OUTPUTS)
    parts = load_int64(arguments, PARTS)
    first = _first_tile(outputs, task, parts)
    last = _first_tile(outputs, task + 1, parts)
    if first == last:
        return
    next_columns = load_int64(arguments, NEXT + 1)
    following = load_int64(arguments, NEXT)
    following += _first_tile(load_int64(arguments, NEXT + 2), task, parts) * _tile_bytes(next_columns)
    if rows >= load_int64(arguments, LEAST_TILED):
        begin_tiles(min(rows, 16))
        for row in range(0, rows, _ROWS_A_PASS):
            for tile in range(first, last, 2):
                ahead = weights + (tile + 2) * _tile_bytes(columns) if tile + 2 < last else following
                _multiply_tiled(arguments, task, tile, last, row, min(_ROWS_A_PASS, rows - row), ahead)
        end_tiles()
        return
    end = weights + last * _tile_bytes(columns)
    for tile in range(first, last, 2):
        _multiply_few(arguments, task, tile, last, end, following - end)


@kernel
def _multiply_few(arguments: int, task: int, tile: int, last: int, end: int, jump: int) -> None:
    """A pair from ``tile`` on, but none from ``last`` on; ``product_tile`` says what the others are."""
    rows = load_int64(arguments, ROWS)
    columns = load_int64(arguments, COLUMNS)
    outputs = load_int64(arguments, OUTPUTS)
    weights = load_int64(arguments, WEIGHTS) + tile * _tile_bytes(columns)
    x = load_int64(arguments, ADDRESSES)
    is_sums = load_int64(arguments, RESULT) == SUMS
    count = min(2, last - tile)
    for row in range(0, rows, MAX_ROWS):
        block = scratch_of_task(arguments, task)
        stride = 4 * _PAIR
        if is_sums:
            block = load_int64(arguments, ADDRESSES + 1) + 4 * (row * outputs + tile * LANES)
            stride = 4 * outputs
        for i in range(count):
            product_tile(
                min(MAX_ROWS, rows - row),
                x + row * columns,
                columns,
                weights + i * _tile_bytes(columns),
                columns // STEP,
                end,
                jump,
                block + 4 * LANES * i,
                stride,
            )
        if not is_sums:
            _finish(arguments, block, tile, count, row, min(MAX_ROWS, rows - row))


@kernel
def _multiply_tiled(
    arguments: int, task: int, tile: int, last: int, first_row: int, rows: int, ahead: int
) -> None:
    """A pair from ``tile`` on, but none from ``last`` on, for ``rows`` rows, with AMX; ``ahead`` is the next.

    The last tiles of rows may overlap: they compute some rows twice. So may those of columns, if the number
    of tiles is odd. Both give the same sums again.
    """
    columns = load_int64(arguments, COLUMNS)
    outputs = load_int64(arguments, OUTPUTS)
    is_sums = load_int64(arguments, RESULT) == SUMS
    tile_bytes = _tile_bytes(columns)
    weights = load_int64(arguments, WEIGHTS) + tile * tile_bytes
    count = min(2, last - tile)
    second = weights + (count - 1) * tile_bytes
    x = load_int64(arguments, ADDRESSES) + first_row * columns
    out = load_int64(arguments, ADDRESSES + 1) + 4 * (first_row * outputs + tile * LANES)
    block = scratch_of_task(arguments, task)
    num_blocks = (rows + amx_tiles.ROWS - 1) // amx_tiles.ROWS
    num_steps = columns // amx_tiles.DEPTH
    # The next pair of tiles is asked for, a share of it with each step.
    lines = (2 * tile_bytes // 64 + num_blocks * num_steps - 1) // (num_blocks * num_steps)
    tile_rows = min(16, load_int64(arguments, ROWS))
    last_start = rows - tile_rows
    # Where the next pair's results will be.
    if load_int64(arguments, RESULT) == SWIGLU:
        result = load_int64(arguments, ADDRESSES + 3) + 2 * first_row * outputs + 4 * LANES * (tile // 2 + 1)
        result_stride, result_lines = 2 * outputs, 1
    else:
        result = load_int64(arguments, ADDRESSES + (1 if is_sums else 3))
        result += 4 * (first_row * outputs + LANES * (tile + 2))
        result_stride, result_lines = 4 * outputs, 2
    for step in range(0, num_steps, _STEPS_A_PASS):
        steps = min(_STEPS_A_PASS, num_steps - step)
        is_last = step + steps == num_steps
        for i in range(num_blocks):
            upper = min(amx_tiles.ROWS * i, last_start)
            lower = min(amx_tiles.ROWS * i + 16, last_start)
            partial = block + 4 * _PAIR * amx_tiles.ROWS * i
            start0, start1, start_lower, start_stride = weights, second, 0, 0
            if step > 0:
                start0, start1 = partial, partial + 4 * LANES
                start_lower, start_stride = 16 * 4 * _PAIR, 4 * _PAIR
            sums0, sums1, stride = partial, partial + 16 * 4 * _PAIR, 4 * _PAIR
            if is_last and is_sums and count == 2:
                sums0, sums1, stride = out + 4 * upper * outputs, out + 4 * lower * outputs, 4 * outputs
            place = 4 * LANES + 16 * amx_tiles.DEPTH * step
            multiply_block(
                x + upper * columns + amx_tiles.DEPTH * step,
                x + lower * columns + amx_tiles.DEPTH * step,
                columns,
                weights + place,
                second + place,
                steps,
                start0,
                start1,
                start_lower,
                start_stride,
                sums0,
                sums1,
                stride,
                ahead,
                lines,
            )
            ahead += 64 * lines * steps
            if is_last:
                prefetch_rows(result + amx_tiles.ROWS * i * result_stride, result_stride, result_lines)
            if is_last and not (is_sums and count == 2):
                _finish(arguments, sums0, tile, count, first_row + upper, tile_rows)
                if lower != upper:
                    _finish(arguments, sums1, tile, count, first_row + lower, tile_rows)


@kernel
def _finish(arguments: int, block: int, tile: int, count: int, first_row: int, rows: int) -> None:
    """From a block of sums, int32 [rows, 32], to the node's output; ``count`` tiles of it count."""
    outputs = load_int64(arguments, OUTPUTS)
    result = load_int64(arguments, RESULT)
    if result == SUMS:
        _copy(arguments, block, tile, first_row, rows)
        return
    scale = load_int64(arguments, ADDRESSES + 1)
    column_scale = load_int64(arguments, ADDRESSES + 2)
    y = load_int64(arguments, ADDRESSES + 3)
    if result == FLOATS:
        for n in range(count):
            column = (tile + n) * LANES
            factors = load(column_scale, column)
            for row in range(rows):
                value = multiply(load_integers(block, _PAIR * row + LANES * n), factors)
                value = multiply(value, splat(load_scalar(scale, first_row + row)))
                store(y, (first_row + row) * outputs + column, value)
        return
    columns = outputs // 2
    column = tile // 2 * LANES
    gate_scales = load(column_scale, column)
    up_scales = load(column_scale, columns + column)
    for row in range(rows):
        factor = splat(load_scalar(scale, first_row + row))
        gate = multiply(multiply(load_integers(block, _PAIR * row), gate_scales), factor)
        up = multiply(multiply(load_integers(block, _PAIR * row + LANES), up_scales), factor)
        store(y, (first_row + row) * columns + column, swiglu(gate, up))


@kernel
def _copy(arguments: int, block: int, tile: int, first_row: int, rows: int) -> None:
    """The first tile of a block of sums to its place."""
    outputs = load_int64(arguments, OUTPUTS)
    sums = load_int64(arguments, ADDRESSES + 1)
    for row in range(rows):
        # As floats: only the bits are moved.
        store(sums, (first_row + row) * outputs + tile * LANES, load(block, _PAIR * row))
