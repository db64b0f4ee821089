"""Rotary embedding of queries and keys, and the write of keys and values into the cache.

The cache of a layer is [num_blocks, 2, num_kv_heads, block_size, head_dim]: keys, then values. So what one
KV head holds of a block is a contiguous tile. It starts as zeros and never gets a value that is not finite:
attention multiplies what lies behind the end of a context by zero.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def rope_cache(
    qkv,
    q_out,
    cache,
    positions,
    slots,
    cos,
    sin,
    k_factor,
    v_factor,
    num_heads,
    num_kv_heads,
    qkv_stride,
    q_stride,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    LIMIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (tokens, ceil((num_heads + 2 num_kv_heads) / HEADS)).

    qkv [T, qkv_stride], 16-bit: query heads, key heads, value heads. q_out [T, q_stride] may be qkv itself.
    positions and slots int32 [T]: slot = block * BLOCK_SIZE + place in the block, or -1: nothing is cached.
    cos, sin float32 [max_len, HEAD_DIM / 2]. k_factor and v_factor are 1 / scale of an FP8 cache, else 1.
    LIMIT is the largest number of the cache's type. HALF: HEAD_DIM / 2 rounded up to a power of two. EARLY:
    positions, slots, cos and sin are read before the launch before has ended.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    half: tl.constexpr = HEAD_DIM // 2
    position = tl.load(positions + token).to(tl.int64)
    slot = tl.load(slots + token)
    in_half = column < half
    exists = (head < num_heads + 2 * num_kv_heads)[:, None] & in_half[None, :]
    c = tl.load(cos + position * half + column, mask=in_half, other=1.0)[None, :]
    s = tl.load(sin + position * half + column, mask=in_half, other=0.0)[None, :]
    if EARLY:
        # In this order, so that what starts early behind this one finds all done that came before this one.
        gdc_wait()
        gdc_launch_dependents()
    source = qkv + token * qkv_stride + head[:, None] * HEAD_DIM + column[None, :]
    first = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=exists, other=0.0).to(tl.float32)
    is_value = (head >= num_heads + num_kv_heads)[:, None]
    low = tl.where(is_value, first, first * c - second * s)
    high = tl.where(is_value, second, second * c + first * s)

    is_query = exists & (head < num_heads)[:, None]
    target = q_out + token * q_stride + head[:, None] * HEAD_DIM + column[None, :]
    tl.store(target, low.to(q_out.dtype.element_ty), mask=is_query)
    tl.store(target + half, high.to(q_out.dtype.element_ty), mask=is_query)

    factor = tl.where(is_value, v_factor, k_factor)
    low = tl.where(low == low, tl.minimum(tl.maximum(low * factor, -LIMIT), LIMIT), 0.0)
    high = tl.where(high == high, tl.minimum(tl.maximum(high * factor, -LIMIT), LIMIT), 0.0)
    is_cached = exists & (head >= num_heads)[:, None] & (slot >= 0)
    tile = (slot // BLOCK_SIZE).to(tl.int64) * (2 * num_kv_heads) + (head - num_heads)
    place = cache + (tile * BLOCK_SIZE + slot % BLOCK_SIZE)[:, None] * HEAD_DIM + column[None, :]
    tl.store(place, low.to(cache.dtype.element_ty), mask=is_cached)
    tl.store(place + half, high.to(cache.dtype.element_ty), mask=is_cached)
