"""What the GPU's attention kernels are compiled with, and how they are called; read by both sides."""

from __future__ import annotations

from typing import Literal

KernelDType = Literal["bf16", "fp16"]
KvDType = Literal["same", "fp8"]
"""Of the KV cache: that of the activations, or E4M3 with a scale for all keys and one for all values."""

BLOCK_SIZE = 64
HEAD_DIMS = (64, 80, 96, 128, 256)
SOFTCAP_HEAD_DIMS = (128, 256)
DECODE_ROWS = 16
"""Tokens of a sequence times query heads of a KV head that ``decode_attention`` takes."""
MAX_SEQUENCES = 2048
TILE_FIELDS = 4
PLAN_FIELDS = 8

NOTHING = -(2.0**100)
"""The logit of a key that a row does not see. Times any factor it is exact, so that a fused multiply-add of
it and the rounded product is 0; of -1e30 it is 1e21, whose power of two is infinite."""

HALVES_OF_PAIRS = """{
.reg .b32 sign, rest;
and.b32 sign, $2, 0x00800080;
and.b32 rest, $2, 0x007f007f;
shl.b32 sign, sign, 8;
shl.b32 rest, rest, 7;
or.b32 $0, sign, rest;
and.b32 sign, $2, 0x80008000;
and.b32 rest, $2, 0x7f007f00;
shr.b32 rest, rest, 1;
or.b32 $1, sign, rest;
}"""
"""PTX: two pairs of E4M3 in $2 -> the lower and the upper halves as two float16 each, divided by 256."""

PLAN = "plan_decode"


def kernel_name(
    kind: Literal[
        "rope_cache", "prefill_attention", "prefill_hopper", "decode_attention", "decode_few", "widen_cache"
    ],
    dtype: KernelDType,
    kv_dtype: KvDType,
    head_dim: int,
    has_softcap: bool = False,
    has_window: bool = False,
) -> str:
    """Of a compiled kernel."""
    parts = [
        kind,
        dtype,
        "fp8" if kv_dtype == "fp8" else "",
        f"d{head_dim}",
        "softcap" if has_softcap else "",
        "window" if has_window else "",
    ]
    return "_".join(part for part in parts if part)
