"""Copies blocks of an FP8 cache as 16-bit numbers, for a kernel that multiplies these."""

import triton
import triton.language as tl

from engine_runtime.kernels.attention_layout import BLOCK_SIZE, HEAD_DIMS, KernelDType, kernel_name
from engine_runtime.kernels.kernel_spec import KernelSpec

_PIECE = 1024  # divides BLOCK_SIZE times any of HEAD_DIMS


@triton.jit
def widen_cache(
    cache,
    widened,
    widened_tables,
    starts,
    query_start,
    context_len,
    block_tables,
    first_sequence,
    window,
    num_kv_heads,
    table_stride,
    widened_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Grid: (most blocks of a sequence, sequences, 2 num_kv_heads).

    Block b of the i-th sequence from ``first_sequence`` on becomes block starts[i] + b of ``widened``, and so
    says row i of all sequences of ``widened_tables``. Both have the layout of the cache; starts int32. Blocks
    that no query of the step sees through a ``window`` are left out. The others as of the attention kernels.
    """
    block = tl.program_id(0)
    sequence = first_sequence + tl.program_id(1)
    part = tl.program_id(2)
    context = tl.load(context_len + sequence)
    num_queries = tl.load(query_start + sequence + 1) - tl.load(query_start + sequence)
    oldest = tl.where(window > 0, context - num_queries - window + 1, 0)
    if (block * BLOCK_SIZE < context) & ((block + 1) * BLOCK_SIZE > oldest):
        source = tl.load(block_tables + sequence.to(tl.int64) * table_stride + block).to(tl.int64)
        target = tl.load(starts + tl.program_id(1)) + block
        tl.store(widened_tables + sequence.to(tl.int64) * widened_stride + block, target)
        parts = 2 * num_kv_heads
        numbers = cache + (source * parts + part) * (BLOCK_SIZE * HEAD_DIM) + tl.arange(0, PIECE)
        copies = widened + (target.to(tl.int64) * parts + part) * (BLOCK_SIZE * HEAD_DIM)
        copies += tl.arange(0, PIECE)
        for piece in tl.static_range(0, BLOCK_SIZE * HEAD_DIM, PIECE):
            tl.store(copies + piece, tl.load(numbers + piece).to(widened.dtype.element_ty))


def _spec(dtype: KernelDType, head_dim: int) -> KernelSpec:
    return KernelSpec(
        widen_cache,
        kernel_name("widen_cache", dtype, "fp8", head_dim),
        {
            "cache": "*fp8e4nv:16",
            "widened": f"*{dtype}:16",
            "widened_tables": "*i32",
            "starts": "*i32",
            "query_start": "*i32",
            "context_len": "*i32",
            "block_tables": "*i32",
            "first_sequence": "i32",
            "window": "i32",
            "num_kv_heads": "i32",
            "table_stride": "i32",
            "widened_stride": "i32",
        },
        {"BLOCK_SIZE": BLOCK_SIZE, "HEAD_DIM": head_dim, "PIECE": _PIECE},
        num_warps=4,
        architectures=(90,),  # where there is a reader: ``prefill_hopper``
    )


_DTYPES: tuple[KernelDType, ...] = ("bf16", "fp16")
SPECS = [_spec(dtype, head_dim) for dtype in _DTYPES for head_dim in HEAD_DIMS if head_dim <= 128]
