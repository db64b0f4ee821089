"""The forms in which the attention kernels are compiled."""

from collections.abc import Iterator

from engine_runtime.kernels.attention_layout import (
    BLOCK_SIZE,
    DECODE_ROWS,
    HEAD_DIMS,
    MAX_SEQUENCES,
    PLAN,
    SOFTCAP_HEAD_DIMS,
    KernelDType,
    KvDType,
    kernel_name,
)
from engine_runtime.kernels.kernel_spec import (
    ARCHITECTURES,
    FP8_ARCHITECTURES,
    KernelSpec,
    early_where_possible,
)
from engine_runtime.kernels.triton.decode_attention import decode_attention, plan_decode
from engine_runtime.kernels.triton.prefill_attention import prefill_attention
from engine_runtime.kernels.triton.prefill_hopper import prefill_hopper
from engine_runtime.kernels.triton.rope_cache import rope_cache

_LARGEST = {"fp16": 65504.0, "bf16": 3.38e38, "fp8": 448.0}
_SMALL_SHARED_MEMORY = {86, 89, 120}  # 99 KB a program
_LARGE_SHARED_MEMORY = tuple(
    architecture for architecture in ARCHITECTURES if architecture not in _SMALL_SHARED_MEMORY
)

_ATTENTION = {
    "block_tables": "*i32",
    "sinks": "*fp32",
    "scale": "fp32",
    "cap": "fp32",
    "v_scale": "fp32",
    "has_sinks": "i32",
    "window": "i32",
    "group": "i32",
    "num_kv_heads": "i32",
    "q_stride": "i32:16",
    "out_stride": "i32:16",
    "table_stride": "i32",
}


def _padded(head_dim: int) -> int:
    return 1 << (head_dim - 1).bit_length()


def _element(dtype: KernelDType, kv_dtype: KvDType) -> str:
    return "fp8e4nv" if kv_dtype == "fp8" else dtype


def _rope_cache(dtype: KernelDType, kv_dtype: KvDType, head_dim: int) -> KernelSpec:
    cache = _element(dtype, kv_dtype)
    return KernelSpec(
        rope_cache,
        kernel_name("rope_cache", dtype, kv_dtype, head_dim),
        {
            "qkv": f"*{dtype}:16",
            "q_out": f"*{dtype}:16",
            "cache": f"*{cache}:16",
            "positions": "*i32",
            "slots": "*i32",
            "cos": "*fp32:16",
            "sin": "*fp32:16",
            "k_factor": "fp32",
            "v_factor": "fp32",
            "num_heads": "i32",
            "num_kv_heads": "i32",
            "qkv_stride": "i32:16",
            "q_stride": "i32:16",
        },
        {
            "HEAD_DIM": head_dim,
            "HALF": _padded(head_dim // 2),
            "BLOCK_SIZE": BLOCK_SIZE,
            "HEADS": 1024 // _padded(head_dim),
            "LIMIT": _LARGEST["fp8" if kv_dtype == "fp8" else dtype],
        },
        num_warps=2,
        architectures=FP8_ARCHITECTURES if kv_dtype == "fp8" else ARCHITECTURES,
    )


def _prefill(
    dtype: KernelDType, kv_dtype: KvDType, head_dim: int, has_softcap: bool, architecture: int
) -> KernelSpec:
    padded = _padded(head_dim)
    is_small = architecture in _SMALL_SHARED_MEMORY
    rows = 64 if is_small or (padded == 256 and architecture < 90) else 128
    stages = 3
    if padded == 256 or is_small:
        stages = 1 if padded == 256 and is_small else 2
    return KernelSpec(
        prefill_attention,
        kernel_name("prefill_attention", dtype, kv_dtype, head_dim, has_softcap),
        {
            "q": f"*{dtype}:16",
            "cache": f"*{_element(dtype, kv_dtype)}:16",
            "out": f"*{dtype}:16",
            "tiles": "*i32",
            **_ATTENTION,
        },
        {
            "HEAD_DIM": head_dim,
            "BLOCK_D": padded,
            "BLOCK_SIZE": BLOCK_SIZE,
            "ROWS": rows,
            "SOFTCAP": has_softcap,
            "STAGES": stages,
        },
        num_warps=rows // 16,
        num_stages=stages,
        architectures=(architecture,),
    )


def _prefill_hopper(dtype: KernelDType, head_dim: int, has_softcap: bool, has_window: bool) -> KernelSpec:
    padded = _padded(head_dim)
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)"
    return KernelSpec(
        prefill_hopper,
        kernel_name("prefill_hopper", dtype, "same", head_dim, has_softcap, has_window),
        {
            "q": f"*{dtype}:16",
            # As many columns as the swizzle takes.
            "cache": f"tensordesc<{dtype}[{BLOCK_SIZE}, 64],{layout}>",
            "out": f"*{dtype}:16",
            "tiles": "*i32",
            **_ATTENTION,
            "num_tiles": "i32",
        },
        {
            "HEAD_DIM": head_dim,
            "BLOCK_D": padded,
            "BLOCK_SIZE": BLOCK_SIZE,
            "ROWS": 128,
            "SOFTCAP": has_softcap,
            "STAGES": 2,
            "WINDOWED": has_window,
        },
        num_warps=4,
        # Nine warps, which count as twelve, share 65536 registers.
        max_registers=168,
        architectures=(90,),
        starts_early=True,
    )


def _decode(
    dtype: KernelDType, kv_dtype: KvDType, head_dim: int, has_softcap: bool, architectures: tuple[int, ...]
) -> KernelSpec:
    """For any number of sequences: four or five programs share a multiprocessor."""
    num_warps = 4 if _padded(head_dim) == 256 else 2
    form = {"STEP": BLOCK_SIZE, "COMBINED": 1024 * num_warps, "STAGES": 2}
    if kv_dtype == "fp8":
        form |= {"COMBINED": 2048 * num_warps, "STAGES": 3}
    name = kernel_name("decode_attention", dtype, kv_dtype, head_dim, has_softcap)
    return _decode_form(name, dtype, kv_dtype, head_dim, has_softcap, form, num_warps, architectures)


def _decode_few(dtype: KernelDType, head_dim: int, has_softcap: bool) -> KernelSpec:
    """For few sequences: a program has a multiprocessor for itself, and reads twice as far ahead."""
    step = BLOCK_SIZE if _padded(head_dim) == 256 else 2 * BLOCK_SIZE
    form = {"STEP": step, "COMBINED": 8192, "STAGES": 3}
    name = kernel_name("decode_few", dtype, "same", head_dim, has_softcap)
    return _decode_form(name, dtype, "same", head_dim, has_softcap, form, 4, _LARGE_SHARED_MEMORY)


def _decode_form(
    name: str, dtype: KernelDType, kv_dtype: KvDType, head_dim: int, has_softcap: bool,
    form: dict[str, int], num_warps: int, architectures: tuple[int, ...],
) -> KernelSpec:  # fmt: skip
    is_fp8 = kv_dtype == "fp8"
    return KernelSpec(
        decode_attention,
        name,
        {
            "q": f"*{dtype}:16",
            "cache": "*i16:16" if is_fp8 else f"*{dtype}:16",
            "out": f"*{dtype}:16",
            "tiles": "*i32",
            "partial": "*fp32:16",
            "stats": "*fp32:16",
            "arrivals": "*i32",
            **_ATTENTION,
        },
        {
            "HEAD_DIM": head_dim,
            "BLOCK_D": _padded(head_dim),
            "BLOCK_SIZE": BLOCK_SIZE,
            "ROWS": DECODE_ROWS,
            "PAIRS": is_fp8,
            "SOFTCAP": has_softcap,
            **form,
        },
        num_warps=num_warps,
        num_stages=form["STAGES"],
        architectures=architectures,
    )


def _specs() -> Iterator[KernelSpec]:
    yield KernelSpec(
        plan_decode,
        PLAN,
        {
            "query_start": "*i32",
            "context_len": "*i32",
            "tiles": "*i32",
            "num_sequences": "i32",
            "num_tiles": "i32",
            "window": "i32",
            "num_kv_heads": "i32",
            "num_multiprocessors": "i32",
            "step": "i32",
            "is_alone": "i32",
            "start_cost": "i32",
            "cut_cost": "i32",
            "part_cost": "i32",
        },
        {"MAX_SEQUENCES": MAX_SEQUENCES, "BLOCK_SIZE": BLOCK_SIZE},
        num_warps=8,
    )
    dtypes: tuple[KernelDType, ...] = ("bf16", "fp16")
    kv_dtypes: tuple[KvDType, ...] = ("same", "fp8")
    for head_dim in HEAD_DIMS:
        for dtype in dtypes:
            for kv_dtype in kv_dtypes:
                yield from early_where_possible(_rope_cache(dtype, kv_dtype, head_dim))
                softcaps = (False, True) if head_dim in SOFTCAP_HEAD_DIMS else (False,)
                for has_softcap in softcaps:
                    key = (dtype, kv_dtype, head_dim, has_softcap)
                    architectures = FP8_ARCHITECTURES if kv_dtype == "fp8" else ARCHITECTURES
                    yield from early_where_possible(_decode(*key, architectures))
                    if kv_dtype == "same":
                        yield from early_where_possible(_decode_few(dtype, head_dim, has_softcap))
                    for architecture in architectures:
                        if architecture == 90 and head_dim <= 128 and kv_dtype == "same":
                            for has_window in (False, True):
                                yield _prefill_hopper(dtype, head_dim, has_softcap, has_window)
                        else:
                            yield _prefill(*key, architecture)


SPECS = list(_specs())
