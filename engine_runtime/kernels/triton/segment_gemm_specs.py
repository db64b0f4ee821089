"""Which forms of a segment's matrix products are compiled.

Those that were fastest somewhere on an H200 (tests/benchmarks/results/gpu_segments.md), and for each number
of tokens one that takes any K. A form is its block sizes, stages and warps; names hold all of it, and
``executors/tensorrt/gemm_form.py`` reads them. Forms for E4M3 ("gemv8" ...) take twice the columns.
"""

from engine_runtime.kernels.kernel_spec import ARCHITECTURES, FP8_ARCHITECTURES, KernelSpec
from engine_runtime.kernels.triton.segment_gemm import gemv, skinny_gemm, tiled_gemm

_GEMV = ((8, 512, 3, 4), (8, 256, 4, 2), (16, 512, 1, 8), (16, 256, 3, 4), (16, 128, 4, 4), (32, 64, 4, 4))
_GEMV_FP8 = (
    (8, 1024, 3, 4), (8, 512, 3, 4), (8, 512, 4, 2), (16, 512, 3, 8), (16, 256, 3, 4), (16, 128, 4, 4),
    (32, 64, 4, 4),
)  # fmt: skip
# role: (NORM, ADD, ACTIVATION, type of out)
_GEMV_ROLES = {
    "add": (False, True, "", "bf16"),
    "norm": (True, False, "", "bf16"),
    "norm_add": (True, True, "", "bf16"),
    "norm_silu": (True, False, "silu", "bf16"),
    "norm_logits": (True, False, "", "fp32"),
}
# role: (SPLIT, ACTIVATION, type of out)
_GEMM_ROLES = {
    "plain": (1, "", "bf16"),
    "parts2": (2, "", "fp32"),
    "parts4": (4, "", "fp32"),
    "silu": (1, "silu", "bf16"),
    "gelu": (1, "gelu", "bf16"),
    "logits": (1, "", "fp32"),
}
_SKINNY_NARROW = (
    (16, 64, 128, 5, 4), (16, 32, 128, 6, 4), (16, 32, 64, 8, 4), (16, 64, 64, 8, 4), (16, 128, 64, 6, 4),
    (32, 64, 128, 5, 4), (32, 32, 64, 8, 4), (32, 128, 64, 6, 4),
    (64, 64, 128, 5, 4), (64, 64, 64, 8, 4), (64, 128, 64, 6, 4), (64, 32, 64, 6, 4),
)  # fmt: skip
_SKINNY_GATED = (
    (16, 32, 256, 3, 4), (16, 32, 128, 5, 4), (16, 64, 128, 4, 8), (16, 64, 64, 5, 8),
    (32, 64, 128, 4, 8), (32, 128, 64, 4, 8), (32, 64, 64, 6, 4), (32, 64, 64, 4, 4),
    (64, 64, 64, 6, 4), (64, 128, 64, 4, 8), (64, 64, 128, 4, 8), (64, 64, 64, 3, 4),
)  # fmt: skip
# For GELU, one of the fastest and one for any K.
_SKINNY_GELU = (
    (16, 32, 256, 3, 4), (16, 64, 64, 5, 8), (32, 64, 128, 4, 8), (32, 64, 64, 4, 4),
    (64, 128, 64, 4, 8), (64, 64, 64, 3, 4),
)  # fmt: skip
_SKINNY_LOGITS = (
    (16, 64, 128, 4, 8), (16, 32, 128, 6, 4), (16, 32, 64, 8, 4),
    (32, 64, 128, 4, 8), (32, 128, 128, 4, 8), (32, 64, 64, 6, 4),
    (64, 128, 128, 4, 8), (64, 128, 64, 6, 4), (64, 64, 64, 4, 4),
)  # fmt: skip
_TILED = {
    "plain": (
        (64, 64, 64, 6, 4), (64, 128, 64, 5, 4), (128, 128, 64, 4, 4), (128, 256, 64, 4, 8),
    ),
    "parts2": ((64, 64, 64, 6, 4), (64, 64, 128, 4, 4), (128, 128, 64, 4, 8)),
    "parts4": ((64, 128, 64, 5, 4), (128, 128, 128, 3, 8), (128, 256, 64, 4, 8)),
    "silu": (
        (64, 64, 64, 5, 4), (64, 128, 64, 4, 8), (128, 64, 64, 3, 4), (128, 128, 64, 4, 8),
    ),
    "gelu": ((64, 64, 64, 5, 4), (128, 64, 64, 3, 4)),
    "logits": ((64, 256, 64, 4, 4),),
}  # fmt: skip

# Bytes a program may have, less what Triton takes for its own.
_SHARED_MEMORY = {80: 160 << 10, 86: 96 << 10, 89: 96 << 10, 90: 220 << 10, 100: 220 << 10, 120: 96 << 10}

Blocks = tuple[int, ...]


def _block_name(*numbers: int) -> str:
    return "x".join(map(str, numbers))


def _gemv_spec(role: str, blocks: Blocks, *, is_fp8: bool) -> KernelSpec:
    bn, bk, stages, warps = blocks
    norm, add, activation, out = _GEMV_ROLES[role]
    return KernelSpec(
        gemv,
        f"gemv{'8' if is_fp8 else ''}_{role}_{_block_name(1, *blocks)}",
        {
            "x": "*bf16:16",
            "w": "*fp8e4nv:16" if is_fp8 else "*bf16:16",
            "w_scale": "*fp32:16",
            "norm_weight": "*bf16:16",
            "addend": "*bf16:16",
            "out": f"*{out}:16",
            "N": "i32",
            "K": "i32:16",
            "epsilon": "fp32",
        },
        {
            "BN": bn,
            "BK": bk,
            "STAGES": stages,
            "NORM": norm,
            "ADD": add,
            "ACTIVATION": activation,
            "SCALED": is_fp8,
        },
        num_warps=warps,
        architectures=FP8_ARCHITECTURES if is_fp8 else ARCHITECTURES,
    )


def _skinny_spec(role: str, blocks: Blocks, *, is_fp8: bool) -> KernelSpec:
    bm, bn, bk, stages, warps = blocks
    if is_fp8:
        bk *= 2
    split, activation, out = _GEMM_ROLES[role]
    columns = bn * (2 if activation else 1)
    shared_memory = (bm + columns) * bk * (1 if is_fp8 else 2) * stages
    kind = "fp8e4nv" if is_fp8 else "bf16"
    return KernelSpec(
        skinny_gemm,
        f"skinny{'8' if is_fp8 else ''}_{role}_{_block_name(bm, bn, bk, stages, warps)}",
        {
            "x": f"*{kind}:16",
            "x_scale": "*fp32:16",
            "w": f"*{kind}:16",
            "w_scale": "*fp32:16",
            "out": f"*{out}:16",
            "T": "i32",
            "N": "i32:16",
            "K": "i32:16",
        },
        {
            "BM": bm,
            "BN": bn,
            "BK": bk,
            "STAGES": stages,
            "SPLIT": split,
            "ACTIVATION": activation,
            "SCALED": is_fp8,
        },
        num_warps=warps,
        architectures=tuple(
            each
            for each in (FP8_ARCHITECTURES if is_fp8 else ARCHITECTURES)
            if shared_memory <= _SHARED_MEMORY[each]
        ),
    )


def _tiled_spec(role: str, blocks: Blocks, *, is_fp8: bool) -> KernelSpec:
    bm, bn, bk, stages, warps = blocks
    if is_fp8:
        bk *= 2
    split, activation, out = _GEMM_ROLES[role]
    kind = "fp8e4nv" if is_fp8 else "bf16"
    return KernelSpec(
        tiled_gemm,
        f"tiled{'8' if is_fp8 else ''}_{role}_{_block_name(bm, bn, bk, stages, warps)}",
        {
            "x": f"tensordesc<{kind}[{bm}, {bk}]>",
            "x_scale": "*fp32:16",
            "w": f"tensordesc<{kind}[{bn}, {bk}]>",
            "w_scale": "*fp32:16",
            "out": f"*{out}:16",
            "T": "i32",
            "N": "i32:16",
            "K": "i32:16",
        },
        {
            "BM": bm,
            "BN": bn,
            "BK": bk,
            "SPLIT": split,
            "ACTIVATION": activation,
            "SCALED": is_fp8,
        },
        num_warps=warps,
        num_stages=stages,
        architectures=(90,),
    )


_WHOLE_OR_HALF = ("plain", "parts2")
# Half of these columns, so that E4M3 has forms for any K too.
_FP8_ANY_K = {
    "skinny_narrow": ((16, 32, 32, 8, 4), (32, 32, 32, 8, 4), (64, 64, 32, 8, 4)),
    "skinny_gated": ((16, 64, 32, 5, 8), (32, 64, 32, 6, 4), (64, 64, 32, 6, 4)),
    "tiled": ((64, 64, 32, 6, 4), (128, 128, 32, 4, 4)),
}

SPECS = [
    *(_gemv_spec(role, blocks, is_fp8=False) for role in _GEMV_ROLES for blocks in _GEMV),
    *(_skinny_spec(role, blocks, is_fp8=False) for role in _WHOLE_OR_HALF for blocks in _SKINNY_NARROW),
    *(_skinny_spec("silu", blocks, is_fp8=False) for blocks in _SKINNY_GATED),
    *(_skinny_spec("gelu", blocks, is_fp8=False) for blocks in _SKINNY_GELU),
    *(_skinny_spec("logits", blocks, is_fp8=False) for blocks in _SKINNY_LOGITS),
    *(_tiled_spec(role, blocks, is_fp8=False) for role, forms in _TILED.items() for blocks in forms),
    # The output projection keeps 16 bits.
    *(
        _gemv_spec(role, blocks, is_fp8=True)
        for role in _GEMV_ROLES
        if role != "norm_logits"
        for blocks in _GEMV_FP8
    ),
    *(
        _skinny_spec(role, blocks, is_fp8=True)
        for role in _WHOLE_OR_HALF
        for blocks in (*_SKINNY_NARROW, *_FP8_ANY_K["skinny_narrow"])
    ),
    *(
        _skinny_spec(role, blocks, is_fp8=True)
        for role, forms in (("silu", _SKINNY_GATED), ("gelu", _SKINNY_GELU))
        for blocks in (*forms, *_FP8_ANY_K["skinny_gated"])
    ),
    *(
        _tiled_spec(role, blocks, is_fp8=True)
        for role, forms in _TILED.items()
        if role != "logits"
        for blocks in (*forms, *(_FP8_ANY_K["tiled"] if role in ("plain", "silu", "gelu") else ()))
    ),
]
