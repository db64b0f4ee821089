"""Which forms of ``hopper_gemm`` and ``thin_gemm`` are compiled: those that were fastest somewhere.

As in ``segment_gemm_specs.py``, names hold block sizes, stages and warps, and E4M3 takes twice the columns.
"""

from engine_runtime.kernels.kernel_spec import KernelSpec
from engine_runtime.kernels.triton.segment_hopper import hopper_gemm
from engine_runtime.kernels.triton.segment_thin import thin_gemm

# role: (SPLIT, ACTIVATION, type of out)
_ROLES = {
    "plain": (1, "", "bf16"),
    "parts2": (2, "", "fp32"),
    "parts4": (4, "", "fp32"),
    "silu": (1, "silu", "bf16"),
    "gelu": (1, "gelu", "bf16"),
    "logits": (1, "", "fp32"),
}
# Wide and tall tiles, smaller ones, which leave fewer multiprocessors idle at the end, and those between.
_WIDE, _TALL, _SMALL, _MIDDLE = (128, 256, 64, 4), (256, 128, 64, 4), (128, 128, 64, 6), (192, 128, 64, 5)
_HOPPER = {
    "plain": (_WIDE, _TALL, _SMALL, _MIDDLE),
    "parts2": (_SMALL, _MIDDLE),
    "parts4": (_SMALL, _MIDDLE),
    "silu": (_WIDE, _TALL, _SMALL, _MIDDLE),
    "gelu": (_WIDE, _SMALL),
    "logits": (_WIDE, _TALL, _SMALL),
}
_THIN = {
    "plain": (
        (16, 64, 256, 5), (16, 64, 128, 8), (32, 64, 256, 4), (32, 64, 128, 8),
        (64, 64, 256, 3), (64, 64, 128, 6),
    ),
    "parts2": (
        (16, 64, 256, 4), (16, 64, 128, 8), (32, 64, 256, 4), (32, 64, 128, 8),
        (64, 64, 256, 3), (64, 64, 128, 6),
    ),
    "parts4": ((16, 64, 256, 4), (32, 64, 256, 4), (64, 64, 256, 3)),
    "silu": ((16, 128, 256, 3), (16, 128, 128, 5), (32, 128, 128, 5), (64, 128, 128, 4)),
    "gelu": ((16, 128, 128, 5), (32, 128, 128, 5), (64, 128, 128, 4)),
    "logits": ((16, 64, 256, 5), (16, 128, 128, 5), (32, 64, 256, 4), (32, 128, 128, 5)),
}  # fmt: skip


def _spec(kind: str, role: str, blocks: tuple[int, ...], *, is_fp8: bool) -> KernelSpec:
    bm, bn, bk, stages = blocks
    if is_fp8:
        bk *= 2
    split, activation, out = _ROLES[role]
    element, bits = ("fp8e4nv", 8) if is_fp8 else ("bf16", 16)
    layout = f"NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth={bits}, rank=2)"
    is_thin = kind == "thin"
    groups = 1 if is_thin else 3 if bm == 192 else 2
    return KernelSpec(
        thin_gemm if is_thin else hopper_gemm,
        f"{kind}{'8' if is_fp8 else ''}_{role}_{bm}x{bn}x{bk}x{stages}x4",
        {
            "x": f"tensordesc<{element}[{bm // groups}, {bk}],{layout}>",
            "x_scale": "*fp32:16",
            "w": f"tensordesc<{element}[{bn // 2}, {bk}],{layout}>",
            "w_scale": "*fp32:16",
            "out": f"*{out}:16",
            "T": "i32",
            "N": "i32:16",
            "K": "i32:16",
        },
        {
            **({} if is_thin else {"GROUPS": groups}),
            "BM": bm,
            "BN": bn,
            "BK": bk,
            "STAGES": stages,
            "SPLIT": split,
            "ACTIVATION": activation,
            "SCALED": is_fp8,
        },
        num_warps=4,
        # Warps come in fours, which share 65536 registers: two to four times four.
        max_registers=128 if groups == 3 else 168,
        architectures=(90,),
        starts_early=True,
    )


SPECS = [
    _spec(kind, role, blocks, is_fp8=is_fp8)
    for is_fp8 in (False, True)
    for kind, forms in (("hopper", _HOPPER), ("thin", _THIN))
    for role, choices in forms.items()
    # The output projection keeps 16 bits.
    if not (is_fp8 and role == "logits")
    for blocks in choices
]
