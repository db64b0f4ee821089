"""What a segment does to each row between its matrix products."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine_runtime.kernels.kernel_spec import (
    ARCHITECTURES,
    FP8_ARCHITECTURES,
    KernelSpec,
    early_where_possible,
)

_MAX_PARTS = tl.constexpr(4)
_E4M3_MAX = tl.constexpr(448.0)
_LEAST_SCALE = tl.constexpr(1e-12)  # of a row of zeros


@triton.jit
def _start(EARLY: tl.constexpr):
    """Lets the next launch start, and waits for the one before, where it need not have ended yet."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _normed(x, weight, size, epsilon):
    """RMSNorm of a float32 row that is 0 beyond ``size``; float32."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / size + epsilon) * weight


@triton.jit
def _sum_parts(y, offsets, mask, num_parts, part_size):
    """The sum of up to 4 arrays that lie one after the other; all are loaded at once."""
    total = tl.zeros(offsets.shape, tl.float32)
    for part in tl.static_range(_MAX_PARTS):
        wanted = mask & (part < num_parts)
        total += tl.load(y + part * part_size + offsets, mask=wanted, other=0.0).to(tl.float32)
    return total


@triton.jit
def add_norm(
    y,
    residual,
    post_weight,
    weight,
    residual_out,
    normed,
    scales,
    num_parts,
    has_post,
    T,
    H,
    epsilon,
    BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """residual_out = residual + y; normed = RMSNorm(residual_out). Grid: T.

    y [num_parts, T, H], whose parts are summed; with 0 parts there is none. residual, residual_out, normed
    [T, H]; ``residual_out`` may be ``residual``. has_post 1: y is itself normalized first (``post_weight``).
    weight, post_weight [H]. BLOCK >= H. QUANTIZE: normed is E4M3, to be multiplied by ``scales`` [T].
    """
    _start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < H
    offsets = row * H + columns
    total = tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    added = _sum_parts(y, offsets, mask, num_parts, T.to(tl.int64) * H)
    if has_post != 0:
        factor = tl.load(post_weight + columns, mask=mask, other=0.0).to(tl.float32)
        added = _normed(added, factor, H, epsilon)
    rounded = (total + added).to(residual_out.dtype.element_ty)
    tl.store(residual_out + offsets, rounded, mask=mask)
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    result = _normed(rounded.to(tl.float32), factor, H, epsilon)
    if QUANTIZE:
        scale = tl.maximum(tl.max(tl.abs(result), 0) / _E4M3_MAX, _LEAST_SCALE)
        tl.store(scales + row, scale)
        result = result / scale
    tl.store(normed + offsets, result.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def quantize_rows(x, y, scales, size, BLOCK: tl.constexpr, ONCE: tl.constexpr, EARLY: tl.constexpr):
    """y = E4M3 of x / scales, where the largest number of each row becomes 448. Grid: rows.

    x, y [rows, size], scales float32 [rows]. Used for activations at each step, for weights when loaded.
    ONCE: size <= BLOCK, and x is read once.
    """
    _start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    if ONCE:
        x_row = tl.load(x + row * size + columns, mask=columns < size, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(x_row), 0) / _E4M3_MAX, _LEAST_SCALE)
        tl.store(scales + row, scale)
        tl.store(y + row * size + columns, (x_row / scale).to(y.dtype.element_ty), mask=columns < size)
        return
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        mask = start + columns < size
        values = tl.load(x + row * size + start + columns, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    scale = tl.maximum(tl.max(largest, 0) / _E4M3_MAX, _LEAST_SCALE)
    tl.store(scales + row, scale)
    for start in range(0, size, BLOCK):
        mask = start + columns < size
        values = tl.load(x + row * size + start + columns, mask=mask, other=0.0).to(tl.float32) / scale
        tl.store(y + row * size + start + columns, values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def finish_heads(
    y,
    bias,
    query_weight,
    key_weight,
    out,
    num_parts,
    has_bias,
    has_norm,
    num_query_heads,
    num_key_heads,
    head_dim,
    epsilon,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Sums the parts of the merged query, key and value projection, adds its bias, normalizes its heads.

    Grid: (T, num_query_heads + 2 num_key_heads). y [num_parts, T, width], out [T, width] and bias [width];
    ``out`` may be ``y`` if there is one part. has_norm 1: RMSNorm of each query head (``query_weight``
    [head_dim]) and of each key head. BLOCK >= head_dim.
    """
    _start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    mask = columns < head_dim
    width = (num_query_heads + 2 * num_key_heads) * head_dim
    offsets = row * width + head * head_dim + columns
    x = _sum_parts(y, offsets, mask, num_parts, tl.num_programs(0).to(tl.int64) * width)
    if has_bias != 0:
        x += tl.load(bias + head * head_dim + columns, mask=mask, other=0.0).to(tl.float32)
    if (has_norm != 0) & (head < num_query_heads + num_key_heads):
        weight = query_weight if head < num_query_heads else key_weight
        factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        x = _normed(x, factor, head_dim, epsilon)
    tl.store(out + offsets, x.to(out.dtype.element_ty), mask=mask)


def _add_norm_spec(y: str, weight: str, block: int, normed: str) -> KernelSpec:
    is_fp8 = normed != "bf16"
    return KernelSpec(
        add_norm,
        f"add_norm{'8' if is_fp8 else ''}_{y}_{weight}_{block}",
        {
            "y": f"*{y}:16",
            "residual": "*bf16:16",
            "post_weight": f"*{weight}:16",
            "weight": f"*{weight}:16",
            "residual_out": "*bf16:16",
            "normed": f"*{normed}:16",
            "scales": "*fp32:16",
            "num_parts": "i32",
            "has_post": "i32",
            "T": "i32",
            "H": "i32:16",
            "epsilon": "fp32",
        },
        {"BLOCK": block, "QUANTIZE": is_fp8},
        num_warps=min(max(block // 512, 2), 16),
        architectures=FP8_ARCHITECTURES if is_fp8 else ARCHITECTURES,
    )


def _finish_heads_spec(y: str, weight: str, block: int) -> KernelSpec:
    return KernelSpec(
        finish_heads,
        f"finish_heads_{y}_{weight}_{block}",
        {
            "y": f"*{y}:16",
            "bias": "*bf16:16",
            "query_weight": f"*{weight}:16",
            "key_weight": f"*{weight}:16",
            "out": "*bf16:16",
            "num_parts": "i32",
            "has_bias": "i32",
            "has_norm": "i32",
            "num_query_heads": "i32",
            "num_key_heads": "i32",
            "head_dim": "i32:16",
            "epsilon": "fp32",
        },
        {"BLOCK": block},
        num_warps=1,
    )


def _quantize_rows_spec(block: int | None) -> KernelSpec:
    return KernelSpec(
        quantize_rows,
        "quantize_rows" if block is None else f"quantize_row_{block}",
        {"x": "*bf16:16", "y": "*fp8e4nv:16", "scales": "*fp32:16", "size": "i32:16"},
        {"BLOCK": block or 4096, "ONCE": block is not None},
        num_warps=8 if block is None else min(max(block // 512, 4), 32),
        architectures=FP8_ARCHITECTURES,
    )


_TYPES = [(y, weight) for y in ("bf16", "fp32") for weight in ("bf16", "fp32")]
_SPECS = [
    *(
        _add_norm_spec(*types, block, normed)
        for types in _TYPES
        for block in (1024, 2048, 4096, 8192, 16384)
        for normed in ("bf16", "fp8e4nv")
    ),
    *(_finish_heads_spec(*types, block) for types in _TYPES for block in (32, 64, 128, 256)),
    *(_quantize_rows_spec(block) for block in (None, 1024, 2048, 4096, 8192, 16384, 32768)),
]
SPECS = [each for spec in _SPECS for each in early_where_possible(spec)]
