"""Intel AMX for numba: products of int8 matrices in tiles of 16 x 16 sums.

A tile register holds 16 rows of 64 bytes. One instruction adds to 16 x 16 sums, int32, the product of 16 rows
of 64 uint8 with 16 columns of 64 int8, without saturating, in 16 cycles: eight times the arithmetic of VNNI.
Weights lie in memory as ``packed_weights`` has them: 16 columns, each 4 of k together.

    sums 0 | sums 1     rows 0..15        x 4        weights 6 | 7
    sums 2 | sums 3     rows 16..31       x 5

Each 64 of k load two tiles of x and two of weights for four products: half of what the first-level cache
delivers in their time. From the first-level cache a block of 576 columns reaches 85 % of the peak.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from engine_runtime.executors.onnxruntime.native_call import native, pointer_to
from engine_runtime.kernels.cpu_simd import INT32, INT64, has_feature

ROWS = 32  # of a block
COLUMNS = 32
DEPTH = 64  # of k that one instruction adds up

_HAS_INSTRUCTIONS = has_feature("amx-int8") and has_feature("amx-tile")
_BYTE = ir.IntType(8)
_POINTER = _BYTE.as_pointer()
_LINE = 64

# Linux grants the registers to a process that asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XTILEDATA = 18


@cache
def has_tiles() -> bool:
    """Whether this process may use the tile registers; asks the kernel for them the first time."""
    if not _HAS_INSTRUCTIONS or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA)) == 0


def _call(builder: Any, name: str, *arguments: Any) -> None:
    signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.x86.{name}"), arguments)


def _load(builder: Any, tile: int, address: Any, stride: Any) -> None:
    _call(builder, "tileloadd64", _BYTE(tile), pointer_to(builder, address, _BYTE), stride)


def _store(builder: Any, tile: int, address: Any, stride: Any) -> None:
    _call(builder, "tilestored64", _BYTE(tile), pointer_to(builder, address, _BYTE), stride)


def _multiply_add(builder: Any, sums: int, x: int, weights: int) -> None:
    _call(builder, "tdpbusd", _BYTE(sums), _BYTE(x), _BYTE(weights))


def _prefetch(builder: Any, address: Any) -> None:
    """Asks for a line of memory, for the second-level cache."""
    signature = ir.FunctionType(ir.VoidType(), [_POINTER, INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(function, [pointer_to(builder, address, _BYTE), INT32(0), INT32(2), INT32(1)])


@native
def begin_tiles(typing_context: Any, num_rows: Any) -> Any:
    """Sets up the tile registers of this thread for tiles of x and of sums with 1 to 16 rows."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _HAS_INSTRUCTIONS:
            rows = builder.trunc(arguments[0], _BYTE)
            # Palette 1; bytes of a row, uint16, from 16 on; rows, uint8, from 48 on.
            words = [_BYTE(0)] * 64
            words[0] = _BYTE(1)
            for tile in range(8):
                words[16 + 2 * tile] = _BYTE(64)
            with builder.goto_entry_block():
                memory = builder.alloca(ir.ArrayType(_BYTE, 64))
                memory.align = 64
            builder.store(ir.Constant(ir.ArrayType(_BYTE, 64), words), memory)
            for tile in range(8):
                place = builder.gep(memory, [INT32(0), INT32(48 + tile)])
                builder.store(_BYTE(16) if tile >= 6 else rows, place)
            _call(builder, "ldtilecfg", builder.bitcast(memory, _POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@native
def end_tiles(typing_context: Any) -> Any:
    """Releases the tile registers, which the kernel would save with the thread."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _HAS_INSTRUCTIONS:
            _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@native
def prefetch_rows(typing_context: Any, address: Any, stride: Any, lines: Any) -> Any:
    """Asks for 1 or 2 cache lines of each of 32 rows, ``stride`` bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, stride, line_count = arguments
        has_two = builder.icmp_signed("==", line_count, INT64(2))
        for row in range(ROWS):
            _prefetch(builder, builder.add(first, builder.mul(stride, INT64(row))))
        with builder.if_then(has_two):
            for row in range(ROWS):
                place = builder.add(first, builder.mul(stride, INT64(row)))
                _prefetch(builder, builder.add(place, INT64(_LINE)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@native
def multiply_block(
    typing_context: Any,
    x0: Any,
    x1: Any,
    x_stride: Any,
    weights0: Any,
    weights1: Any,
    num_steps: Any,
    start0: Any,
    start1: Any,
    start_lower: Any,
    start_stride: Any,
    sums0: Any,
    sums1: Any,
    sums_stride: Any,
    ahead: Any,
    lines_a_step: Any,
) -> Any:
    """sums = start + x weights, for two tiles of rows and two of columns, and ``64 * num_steps`` of k.

    Args:
        x0, x1: first byte of the rows; rows are ``x_stride`` bytes apart.
        weights0, weights1: 1 KB for each step, packed.
        start0, start1: what the sums of the upper rows begin with, for either tile of columns; rows of 16
            int32, ``start_stride`` bytes apart.
        start_lower: bytes from there to the lower rows.
        sums0, sums1: the results of upper and lower rows; rows of 32 int32, ``sums_stride`` bytes apart.
        ahead: memory to ask for, ``lines_a_step`` cache lines in each step.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not _HAS_INSTRUCTIONS:
            return context.get_dummy_value()
        x0, x1, x_step, w0, w1, step_count, start0, start1, lower, start_step = arguments[:10]
        sums0, sums1, sums_step, ahead, line_count = arguments[10:]
        for tile, start in enumerate((start0, start1)):
            _load(builder, tile, start, start_step)
            _load(builder, 2 + tile, builder.add(start, lower), start_step)
        with cgutils.for_range(builder, step_count) as loop:
            column = builder.mul(loop.index, INT64(DEPTH))
            place = builder.mul(loop.index, INT64(16 * DEPTH))
            _load(builder, 4, builder.add(x0, column), x_step)
            _load(builder, 6, builder.add(w0, place), INT64(64))
            _multiply_add(builder, 0, 4, 6)
            _load(builder, 7, builder.add(w1, place), INT64(64))
            _multiply_add(builder, 1, 4, 7)
            _load(builder, 5, builder.add(x1, column), x_step)
            _multiply_add(builder, 2, 5, 6)
            _multiply_add(builder, 3, 5, 7)
            first = builder.add(ahead, builder.mul(builder.mul(loop.index, line_count), INT64(_LINE)))
            with cgutils.for_range(builder, line_count) as lines:
                _prefetch(builder, builder.add(first, builder.mul(lines.index, INT64(_LINE))))
        for half, sums in enumerate((sums0, sums1)):
            for tile in range(2):
                _store(builder, 2 * half + tile, builder.add(sums, INT64(64 * tile)), sums_step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 15), generate
