"""What a segment does to each row between its matrix products."""

import triton
import triton.language as tl


@triton.jit
def _normed(x, weight, mask, size, epsilon):
    """RMSNorm of a float32 row, 0 outside of ``mask``; float32."""
    scale = tl.rsqrt(tl.sum(x * x, 0) / size + epsilon)
    return x * scale * weight


@triton.jit
def add_norm(
    y,
    residual,
    post_weight,
    weight,
    residual_out,
    normed,
    T,
    H,
    epsilon,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    POST: tl.constexpr,
):
    """residual_out = residual + y; normed = RMSNorm(residual_out). Grid: T.

    y [PARTS, T, H], whose parts are summed; with PARTS 0 there is none. residual, residual_out, normed
    [T, H]; ``residual_out`` may be ``residual``. POST: y is itself normalized first (``post_weight``).
    weight, post_weight [H]. BLOCK >= H.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    offsets = row * H + columns
    total = tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        added = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            added += tl.load(y + part * T.to(tl.int64) * H + offsets, mask=mask, other=0.0).to(tl.float32)
        if POST:
            factor = tl.load(post_weight + columns, mask=mask, other=0.0).to(tl.float32)
            added = _normed(added, factor, mask, H, epsilon)
        total += added
    rounded = total.to(residual_out.dtype.element_ty)
    tl.store(residual_out + offsets, rounded, mask=mask)
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    result = _normed(rounded.to(tl.float32), factor, mask, H, epsilon)
    tl.store(normed + offsets, result.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def finish_heads(
    y,
    bias,
    query_weight,
    key_weight,
    out,
    T,
    num_query_heads,
    num_key_heads,
    head_dim,
    epsilon,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Sums the parts of the merged query, key and value projection, adds its bias, normalizes its heads.

    Grid: (T, num_query_heads + 2 num_key_heads). y [PARTS, T, width], out and bias of the same width, which
    may be in place. NORM: RMSNorm of each query head (``query_weight`` [head_dim]) and key head. BLOCK >=
    head_dim.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    mask = columns < head_dim
    width = (num_query_heads + 2 * num_key_heads) * head_dim
    offsets = row * width + head * head_dim + columns
    x = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        x += tl.load(y + part * T.to(tl.int64) * width + offsets, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + head * head_dim + columns, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        if head < num_query_heads + num_key_heads:
            weight = query_weight if head < num_query_heads else key_weight
            factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
            x = _normed(x, factor, mask, head_dim, epsilon)
    tl.store(out + offsets, x.to(out.dtype.element_ty), mask=mask)
