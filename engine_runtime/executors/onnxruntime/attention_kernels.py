"""The operator ``Attention``: paged attention as a node of the decoder's graph.

Up to four kernels in sequence: the merged projection back to floats if it comes as integer sums, keys and
values to the cache, attention itself, and its result to int8 rows if a quantized product follows.
``row_kernels`` says how a kernel gets its arguments; what is added to them here starts at ``EXTRA``.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from engine_runtime.executors.onnxruntime.native_call import load_int64, void_pointer
from engine_runtime.executors.onnxruntime.operators import ADDRESSES, COLUMNS, EXTRA, ROTATION, ROWS
from engine_runtime.executors.onnxruntime.row_kernels import (
    dequantize_rows,
    quantize_row_range,
    rows_of_task,
    scratch_of_task,
)
from engine_runtime.executors.onnxruntime.step_record import (
    BLOCK_TABLE_WIDTH,
    BLOCK_TABLES,
    CONTEXT_LEN,
    QUERY_START,
    SEQUENCES,
    TILES,
    UNITS,
)
from engine_runtime.kernels.cpu import ROWS_PER_TILE
from engine_runtime.kernels.cpu_attention import SCORES_STRIDE, attend, write_kv
from engine_runtime.kernels.cpu_compile import kernel
from engine_runtime.kernels.cpu_simd import load_scalar
from engine_runtime.kernels.numpy_types import Float32Array, Int32Array, KvArray

# Words of the arguments.
STEP = EXTRA
QKV = EXTRA + 1  # float32 [tokens, qkv_size]; 0: the first input
OUT = EXTRA + 2  # float32 [tokens, q_size]; 0: the first output
CACHE = EXTRA + 3
CACHE_SIZE = EXTRA + 4
COS = EXTRA + 5
SIN = EXTRA + 6
MAX_LEN = EXTRA + 7
NUM_HEADS = EXTRA + 8
NUM_KV_HEADS = EXTRA + 9
HEAD_DIM = EXTRA + 10
VALUE_DIM = EXTRA + 11
BLOCK_SIZE = EXTRA + 12
SLIDING_WINDOW = EXTRA + 13
SCALE = EXTRA + 14  # as float32
SOFTCAP = EXTRA + 15  # as float32
FIRST_OUTPUT = EXTRA + 16  # where in the arguments the address of the first output is
NUM_EXTRA = 17


@kernel
def _array(address: int, rows: int, columns: int) -> Float32Array:
    array: Float32Array = carray(void_pointer(address), (rows, columns), np.float32)
    return array


@kernel
def _vector(address: int, size: int) -> Int32Array:
    array: Int32Array = carray(void_pointer(address), (size,), np.int32)
    return array


@kernel
def _floats(address: int, size: int) -> Float32Array:
    array: Float32Array = carray(void_pointer(address), (size,), np.float32)
    return array


@kernel
def _float32_cache(arguments: int) -> KvArray:
    size: int = load_int64(arguments, CACHE_SIZE)
    array: KvArray = carray(void_pointer(load_int64(arguments, CACHE)), (size,), np.float32)
    return array


@kernel
def _float16_cache(arguments: int) -> KvArray:
    size: int = load_int64(arguments, CACHE_SIZE)
    array: KvArray = carray(void_pointer(load_int64(arguments, CACHE)), (size,), np.uint16)
    return array


@kernel
def _qkv_address(arguments: int) -> int:
    address: int = load_int64(arguments, QKV)
    if address == 0:
        address = load_int64(arguments, ADDRESSES)
    return address


@kernel
def _out_address(arguments: int) -> int:
    address: int = load_int64(arguments, OUT)
    if address == 0:
        address = load_int64(arguments, load_int64(arguments, FIRST_OUTPUT))
    return address


def dequantize_qkv(arguments: int, task: int) -> None:
    """sums int32 [T, columns], scale [T], column_scale [columns] -> the floats at ``QKV``."""
    first, last = rows_of_task(arguments, task)
    dequantize_rows(
        load_int64(arguments, ADDRESSES),
        load_int64(arguments, ADDRESSES + 1),
        load_int64(arguments, ADDRESSES + 2),
        load_int64(arguments, QKV),
        load_int64(arguments, COLUMNS),
        first,
        last,
    )


def write_kv_float32(arguments: int, task: int) -> None:
    """Rotates the new keys and stores keys and values; a task is some of the sequences."""
    _write_kv(arguments, task, _float32_cache(arguments))


def write_kv_float16(arguments: int, task: int) -> None:
    _write_kv(arguments, task, _float16_cache(arguments))


def attend_float32(arguments: int, task: int) -> None:
    """Attention; a task is some of the units, which are the KV heads of the tiles."""
    _attend(arguments, task, _float32_cache(arguments))


def attend_float16(arguments: int, task: int) -> None:
    _attend(arguments, task, _float16_cache(arguments))


@kernel
def _write_kv(arguments: int, task: int, cache: KvArray) -> None:
    step = load_int64(arguments, STEP)
    num_sequences = load_int64(step, SEQUENCES)
    share = load_int64(step, SEQUENCES + 1)
    first = task * share
    last = min(first + share, num_sequences)
    num_tokens = load_int64(arguments, ROWS)
    width = load_int64(step, BLOCK_TABLE_WIDTH)
    head_dim = load_int64(arguments, HEAD_DIM)
    max_len = load_int64(arguments, MAX_LEN)
    block_tables = carray(void_pointer(load_int64(step, BLOCK_TABLES)), (num_sequences, width), np.int32)
    write_kv(
        _array(_qkv_address(arguments), num_tokens, load_int64(arguments, COLUMNS)),
        cache,
        _vector(load_int64(step, QUERY_START), num_sequences + 1),
        _vector(load_int64(step, CONTEXT_LEN), num_sequences),
        block_tables,
        _array(load_int64(arguments, COS), max_len, head_dim // 2),
        _array(load_int64(arguments, SIN), max_len, head_dim // 2),
        load_int64(arguments, NUM_HEADS),
        load_int64(arguments, NUM_KV_HEADS),
        head_dim,
        load_int64(arguments, VALUE_DIM),
        load_int64(arguments, BLOCK_SIZE),
        first,
        last,
    )


@kernel
def _attend(arguments: int, task: int, cache: KvArray) -> None:
    step = load_int64(arguments, STEP)
    share = load_int64(step, UNITS + 1)
    first = task * share
    num_units = load_int64(step, UNITS)
    last = min(first + share, num_units)
    num_sequences = load_int64(step, SEQUENCES)
    num_tokens = load_int64(arguments, ROWS)
    width = load_int64(step, BLOCK_TABLE_WIDTH)
    num_heads = load_int64(arguments, NUM_HEADS)
    num_kv_heads = load_int64(arguments, NUM_KV_HEADS)
    head_dim = load_int64(arguments, HEAD_DIM)
    value_dim = load_int64(arguments, VALUE_DIM)
    max_len = load_int64(arguments, MAX_LEN)
    rows = max(ROWS_PER_TILE, num_heads // num_kv_heads)
    q = scratch_of_task(arguments, task)
    outputs = q + 4 * rows * value_dim
    scores = outputs + 4 * rows * value_dim
    maxima = scores + 4 * rows * SCORES_STRIDE
    sums = maxima + 4 * rows
    block_tables = carray(void_pointer(load_int64(step, BLOCK_TABLES)), (num_sequences, width), np.int32)
    tiles = carray(void_pointer(load_int64(step, TILES)), (num_units // num_kv_heads, 3), np.int32)
    attend(
        _array(_qkv_address(arguments), num_tokens, load_int64(arguments, COLUMNS)),
        cache,
        _vector(load_int64(step, QUERY_START), num_sequences + 1),
        _vector(load_int64(step, CONTEXT_LEN), num_sequences),
        block_tables,
        _array(load_int64(arguments, COS), max_len, head_dim // 2),
        _array(load_int64(arguments, SIN), max_len, head_dim // 2),
        num_heads,
        num_kv_heads,
        head_dim,
        value_dim,
        load_int64(arguments, BLOCK_SIZE),
        np.float64(load_scalar(arguments, 2 * SCALE)),
        load_int64(arguments, SLIDING_WINDOW),
        np.float64(load_scalar(arguments, 2 * SOFTCAP)),
        tiles,
        first,
        last,
        _floats(q, rows * value_dim),
        _floats(scores, rows * SCORES_STRIDE),
        _floats(outputs, rows * value_dim),
        _floats(maxima, rows),
        _floats(sums, rows),
        _array(_out_address(arguments), num_tokens, num_heads * head_dim),
    )


def quantize_attention(arguments: int, task: int) -> None:
    """The floats at ``OUT`` to q uint8 [T, q_size], scale [T]."""
    first, last = rows_of_task(arguments, task)
    output = load_int64(arguments, FIRST_OUTPUT)
    quantize_row_range(
        load_int64(arguments, OUT),
        load_int64(arguments, output),
        load_int64(arguments, output + 1),
        scratch_of_task(arguments, task),
        load_int64(arguments, NUM_HEADS) * load_int64(arguments, HEAD_DIM),
        load_int64(arguments, ROTATION),
        first,
        last,
    )


def scratch_bytes(num_heads: int, num_kv_heads: int, value_dim: int) -> int:
    """Scratch memory of one task of ``attend``."""
    rows = max(ROWS_PER_TILE, num_heads // num_kv_heads)
    return 4 * rows * (2 * value_dim + SCORES_STRIDE + 2)
