"""Which compiled matrix products can compute which projection of a segment, the best predicted first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from engine_runtime.executors.tensorrt.gemm_form import GemmForm
from engine_runtime.executors.tensorrt.kernel_cost import best_first
from engine_runtime.model_config import ModelConfig
from engine_runtime.models.segment import SegmentKind

Projection = Literal["attention_output", "gate_up", "mlp_output", "qkv", "logits"]
Quantization = Literal["none", "fp8"]

_MAX_SPLIT_TOKENS = 1024  # beyond, there are tiles enough, and partial sums would be large
_LEAST_TILED_TOKENS = 64
_K_STEP = 64
_ONE_TOKEN = ("8x512x4x2", "8x512x3x4", "8x256x4x2", "16x128x4x4")  # the first is there for FP8 only


@dataclass(frozen=True, slots=True)
class Shape:
    """y [T, N] = x [T, K] W^T; gate_up has 2 N rows in W."""

    n: int
    k: int


def projections(config: ModelConfig, kind: SegmentKind) -> dict[Projection, Shape]:
    """The matrix products of a segment, in order."""
    hidden, gated = config.hidden_size, config.intermediate_size
    found: dict[Projection, Shape] = {}
    if kind != "first":
        found["attention_output"] = Shape(hidden, config.q_size)
        found["gate_up"] = Shape(gated, hidden)
        found["mlp_output"] = Shape(hidden, gated)
    if kind == "last":
        found["logits"] = Shape(config.vocab_size, hidden)
    else:
        found["qkv"] = Shape(config.qkv_size, hidden)
    return found


def is_computable(config: ModelConfig, kind: SegmentKind) -> bool:
    """Whether the kernels know the architecture's layers and like its dimensions."""
    shapes = projections(config, kind).values()
    return (
        not (config.has_o_bias or config.has_mlp_bias)
        and not (kind == "last" and config.final_logit_softcap)
        and config.hidden_size <= 16384
        and config.head_dim % 16 == 0
        and config.head_dim <= 256
        and all(shape.k % _K_STEP == 0 and shape.n % 16 == 0 for shape in shapes)
    )


def is_fused(config: ModelConfig, kind: SegmentKind, num_tokens: int) -> bool:
    """Whether norms and residuals are part of the matrix products: for one token, no norm after a block."""
    return num_tokens == 1 and kind != "first" and config.architecture != "gemma3"


def is_quantized(projection: Projection, quantization: Quantization) -> bool:
    """Whether the projection has E4M3 weights; the output projection always keeps 16 bits."""
    return quantization == "fp8" and projection != "logits"


def candidates(
    forms: Iterable[GemmForm],
    config: ModelConfig,
    kind: SegmentKind,
    projection: Projection,
    num_tokens: int,
    num_multiprocessors: int,
    quantization: Quantization = "none",
) -> list[GemmForm]:
    """The forms that can compute a projection for this many tokens, the best predicted one first."""
    shape = projections(config, kind)[projection]
    fused = is_fused(config, kind, num_tokens)
    roles = _fused_roles(config, projection) if fused else _roles(config, projection)
    found = [
        form
        for form in forms
        if form.role in roles
        and form.is_fp8 == is_quantized(projection, quantization)
        and (form.function == "gemv") == fused
        and shape.k % (form.bk * form.num_parts) == 0
        and _suits(form, num_tokens)
    ]
    if fused:
        return sorted(found, key=_one_token_order)
    return best_first(found, shape.n, shape.k, num_tokens, num_multiprocessors)


def _roles(config: ModelConfig, projection: Projection) -> tuple[str, ...]:
    if projection == "gate_up":
        return ("gelu" if config.architecture == "gemma3" else "silu",)
    return ("logits",) if projection == "logits" else ("plain", "parts2", "parts4")


def _fused_roles(config: ModelConfig, projection: Projection) -> tuple[str, ...]:
    fused: Mapping[Projection, str] = {
        "attention_output": "add",
        "gate_up": "norm_silu",
        "mlp_output": "add",
        "qkv": "norm_add" if config.has_qkv_bias else "norm",
        "logits": "norm_logits",
    }
    return (fused[projection],)


def _suits(form: GemmForm, num_tokens: int) -> bool:
    if form.function == "gemv":
        return num_tokens == 1
    if form.function == "thin" and form.bm > 64:
        return form.bm - 32 < num_tokens <= form.bm
    if form.function in ("skinny", "thin"):
        return form.bm >= num_tokens and (form.bm == 16 or form.bm < 2 * num_tokens)
    if form.num_parts > 1 and num_tokens > _MAX_SPLIT_TOKENS:
        return False
    if num_tokens > 256 and form.bm < 128:
        return False
    return num_tokens >= _LEAST_TILED_TOKENS and (form.bm == 64 or form.bm < 2 * num_tokens)


def _one_token_order(form: GemmForm) -> int:
    """As most projections of Llama 3.1 8B have them on an H200; every first start times them all."""
    return next((at for at, blocks in enumerate(_ONE_TOKEN) if form.name.endswith(blocks)), len(_ONE_TOKEN))
