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
# For 65 to 192 tokens: 64, 128 and 256 rows of W.
_FLAT = ((96, 64, 64, 10), (128, 64, 64, 8), (160, 64, 64, 7), (192, 64, 64, 6))
_SQUARE = ((96, 128, 64, 7), (128, 128, 64, 6), (160, 128, 64, 5), (192, 128, 64, 5))
_LONG = ((96, 256, 64, 4), (128, 256, 64, 4), (160, 256, 64, 4))
_THIN = {
    "plain": (
        (16, 64, 256, 5), (16, 64, 128, 8), (32, 64, 256, 4), (32, 64, 128, 8),
        (64, 64, 256, 3), (64, 64, 128, 6), *_FLAT,
    ),
    "parts2": (
        (16, 64, 256, 4), (16, 64, 128, 8), (32, 64, 256, 4), (32, 64, 128, 8),
        (64, 64, 256, 3), (64, 64, 128, 6), *_FLAT,
    ),
    "parts4": (
        (16, 64, 256, 4), (32, 64, 256, 4), (64, 64, 256, 3), _SQUARE[0], _SQUARE[2], _SQUARE[3],
    ),
    "silu": (
        (16, 128, 256, 3), (16, 128, 128, 5), (32, 128, 128, 5), (64, 128, 128, 4), *_SQUARE[:3], *_LONG,
    ),
    "gelu": ((16, 128, 128, 5), (32, 128, 128, 5), (64, 128, 128, 4), *_SQUARE[:3], *_LONG),
    "logits": ((16, 64, 256, 5), (16, 128, 128, 5), (32, 64, 256, 4), (32, 128, 128, 5), *_SQUARE),
}  # fmt: skip


def _spec(kind: str, role: str, blocks: tuple[int, ...], *, is_fp8: bool) -> KernelSpec:
    bm, bn, bk, stages = blocks
    if is_fp8:
        bk *= 2
    split, activation, out = _ROLES[role]
    element, bits = ("fp8e4nv", 8) if is_fp8 else ("bf16", 16)
    layout = f"NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth={bits}, rank=2)"
    if kind == "thin":
        # A group multiplies 64 rows of W or more, with an activation 64 of gate and 64 of up.
        groups = 2 if bm > 64 and bn > (128 if activation else 64) else 1
        rest = bm - (1 << bm.bit_length() - 1)
        sizes = {"GROUPS": groups, "BM": bm, "REST": rest}
        x_rows, w_rows = rest or bm, bn // (2 * groups if activation else 2)
    else:
        groups = 3 if bm == 192 else 2
        sizes = {"GROUPS": groups, "BM": bm}
        x_rows, w_rows = bm // groups, bn // 2
    return KernelSpec(
        thin_gemm if kind == "thin" else hopper_gemm,
        f"{kind}{'8' if is_fp8 else ''}_{role}_{bm}x{bn}x{bk}x{stages}x4",
        {
            "x": f"tensordesc<{element}[{x_rows}, {bk}],{layout}>",
            "x_scale": "*fp32:16",
            "w": f"tensordesc<{element}[{w_rows}, {bk}],{layout}>",
            "w_scale": "*fp32:16",
            "out": f"*{out}:16",
            "T": "i32",
            "N": "i32:16",
            "K": "i32:16",
        },
        {
            **sizes,
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
