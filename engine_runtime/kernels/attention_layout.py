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

PLAN = "plan_decode"


def kernel_name(
    kind: Literal["rope_cache", "prefill_attention", "decode_attention"],
    dtype: KernelDType,
    kv_dtype: KvDType,
    head_dim: int,
    has_softcap: bool = False,
) -> str:
    """Of a compiled kernel."""
    parts = [
        kind,
        dtype,
        "fp8" if kv_dtype == "fp8" else "",
        f"d{head_dim}",
        "softcap" if has_softcap else "",
    ]
    return "_".join(part for part in parts if part)
