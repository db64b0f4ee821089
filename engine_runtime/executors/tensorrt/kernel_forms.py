"""Which compiled matrix product computes which projection of a segment: all that could, and a first guess."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from engine_runtime.model_config import ModelConfig
from engine_runtime.models.segment import SegmentKind

Projection = Literal["attention_output", "gate_up", "mlp_output", "qkv", "logits"]
Quantization = Literal["none", "fp8"]

_NAME = re.compile(
    r"(?P<function>gemv|skinny|tiled|hopper|thin)(?P<fp8>8?)_(?P<role>\w+?)_(?P<blocks>\d+x\d+x\d+x\d+x\d+)"
)
_MAX_SPLIT_TOKENS = 1024  # beyond, there are tiles enough, and partial sums would be large
_LEAST_TILED_TOKENS = 64
_K_STEP = 64
_PARTS = {"parts2": 2, "parts4": 4}


@dataclass(frozen=True, slots=True)
class GemmForm:
    """One compiled form of a matrix product; see ``segment_gemm.py`` and ``segment_hopper.py``.

    Attributes:
        name: of the kernel.
        bm, bn, bk: tokens, rows of W and columns of both in a tile. With an activation,
            "hopper" and "thin" count rows of gate and up in ``bn``, the others those of gate.
        is_fp8: the weights are E4M3 with a factor for each row.
        num_parts: arrays of partial sums that it writes.
    """

    name: str
    function: str
    role: str
    bm: int
    bn: int
    bk: int
    is_fp8: bool

    @property
    def num_parts(self) -> int:
        return _PARTS.get(self.role, 1)

    @property
    def result_bytes(self) -> int:
        """For each number of the result, in all parts."""
        return self.num_parts * (4 if self.writes_float32 else 2)

    @property
    def columns(self) -> int:
        """Of the result, in a tile."""
        is_pair = self.function in ("hopper", "thin") and self.role in ("silu", "gelu")
        return self.bn // 2 if is_pair else self.bn

    @property
    def writes_float32(self) -> bool:
        return self.role in _PARTS or self.role.endswith("logits")


@dataclass(frozen=True, slots=True)
class Shape:
    """y [T, N] = x [T, K] W^T; gate_up has 2 N rows in W."""

    n: int
    k: int


def parse_forms(names: Iterable[str]) -> tuple[GemmForm, ...]:
    """The matrix products among the names of compiled kernels."""
    return _parse(tuple(names))


@cache
def _parse(names: tuple[str, ...]) -> tuple[GemmForm, ...]:
    found = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is not None:
            bm, bn, bk = map(int, match["blocks"].split("x")[:3])
            function, role, is_fp8 = match["function"], match["role"], match["fp8"] != ""
            found.append(GemmForm(name, function, role, bm, bn, bk, is_fp8))
    return tuple(found)


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
    quantization: Quantization = "none",
) -> list[GemmForm]:
    """The forms that can compute a projection for this many tokens."""
    shape = projections(config, kind)[projection]
    fused = is_fused(config, kind, num_tokens)
    roles = _fused_roles(config, projection) if fused else _roles(config, projection)
    return [
        form
        for form in forms
        if form.role in roles
        and form.is_fp8 == is_quantized(projection, quantization)
        and (form.function == "gemv") == fused
        and shape.k % (form.bk * form.num_parts) == 0
        and _suits(form, num_tokens)
    ]


def first_guess(found: list[GemmForm], projection: Projection, num_tokens: int) -> GemmForm | None:
    """A good form without timing any; None if there are none."""
    if any(form.is_fp8 for form in found):
        for ending in _preferences(_FP8_PREFERENCES, projection, num_tokens):
            for form in found:
                if form.name.endswith(ending):
                    return form
    for ending in _preferences(_PREFERENCES, projection, num_tokens):
        for form in found:
            if _as_bfloat16(form).endswith(ending):
                return form
    return found[0] if found else None


def _as_bfloat16(form: GemmForm) -> str:
    """The name of the form that reads as many bytes at a time of 16-bit weights."""
    if not form.is_fp8:
        return form.name
    name = form.name.replace(f"{form.function}8_", f"{form.function}_")
    return name.replace(f"{form.bm}x{form.bn}x{form.bk}x", f"{form.bm}x{form.bn}x{form.bk // 2}x")


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
    if form.role in _PARTS and num_tokens > _MAX_SPLIT_TOKENS:
        return False
    if num_tokens > 256 and form.bm < 128:
        return False
    return num_tokens >= _LEAST_TILED_TOKENS and (form.bm == 64 or form.bm < 2 * num_tokens)


# Measured on an H200 for Llama 3.1 8B: projection -> (up to this many tokens, forms in order of preference).
_ANY = 1 << 30
_Ranges = tuple[tuple[int, tuple[str, ...]], ...]
_GEMV = (1, ("8x512x3x4", "8x256x4x2", "16x128x4x4"))
_WRITES_HIDDEN: _Ranges = (
    _GEMV,
    (16, ("thin_parts2_16x64x256x4x4", "parts2_16x64x128x5x4", "parts2_16x32x64x8x4", "plain_16x32x64x8x4")),
    (32, ("thin_parts2_32x64x256x4x4", "parts2_32x64x128x5x4", "parts2_32x32x64x8x4", "plain_32x32x64x8x4")),
    (64, ("thin_parts2_64x64x128x6x4", "parts2_64x64x128x5x4", "parts2_64x64x64x8x4", "plain_64x64x64x8x4")),
    (96, ("thin_parts2_96x64x64x10x4", "parts2_64x64x64x6x4", "plain_64x64x64x6x4")),
    (128, ("thin_parts2_128x64x64x8x4", "parts2_64x64x64x6x4", "plain_64x64x64x6x4")),
)
_BEYOND_256: _Ranges = (
    (512, ("hopper_plain_128x128x64x6x4",)),
    (_ANY, ("hopper_plain_128x256x64x4x4",)),
)
_PREFERENCES: Mapping[Projection, _Ranges] = {
    "attention_output": (
        *_WRITES_HIDDEN,
        (160, ("thin_parts2_160x64x64x7x4", "plain_64x64x64x6x4")),
        (192, ("thin_parts2_192x64x64x6x4", "plain_64x64x64x6x4")),
        (256, ("hopper_parts2_128x128x64x6x4", "plain_64x64x64x6x4")),
        *_BEYOND_256,
    ),
    "mlp_output": (
        *_WRITES_HIDDEN,
        (160, ("thin_parts4_160x128x64x5x4", "thin_parts2_160x64x64x7x4", "plain_64x64x64x6x4")),
        (192, ("thin_parts4_192x128x64x5x4", "thin_parts2_192x64x64x6x4", "plain_64x64x64x6x4")),
        (256, ("hopper_parts2_128x128x64x6x4", "plain_64x64x64x6x4")),
        (384, ("hopper_parts2_192x128x64x5x4", "hopper_plain_128x128x64x6x4")),
        *_BEYOND_256,
    ),
    "qkv": (
        _GEMV,
        (16, ("thin_plain_16x64x256x5x4", "plain_16x64x128x5x4", "plain_16x32x64x8x4")),
        (32, ("thin_plain_32x64x256x4x4", "plain_32x64x128x5x4", "plain_32x32x64x8x4")),
        (64, ("thin_plain_64x64x128x6x4", "plain_64x64x128x5x4", "plain_64x64x64x8x4")),
        (96, ("thin_plain_96x64x64x10x4",)),
        (128, ("thin_plain_128x64x64x8x4",)),
        (160, ("thin_plain_160x64x64x7x4",)),
        (192, ("thin_plain_192x64x64x6x4",)),
        (256, ("hopper_plain_128x128x64x6x4",)),
        (384, ("hopper_plain_192x128x64x5x4",)),
        (512, ("hopper_plain_128x256x64x4x4",)),
        (1024, ("hopper_plain_128x128x64x6x4",)),
        (_ANY, ("hopper_plain_256x128x64x4x4",)),
    ),
    "gate_up": (
        _GEMV,
        (16, ("_16x32x256x3x4", "_16x32x128x5x4", "_16x64x64x5x8")),
        (32, ("_32x64x128x4x8", "_32x64x64x6x4")),
        (48, ("thin_silu_64x128x128x4x4", "thin_gelu_64x128x128x4x4", "_64x64x64x6x4")),
        (64, ("skinny_silu_64x128x64x4x8", "skinny_gelu_64x128x64x4x8", "_64x64x64x6x4")),
        (96, ("_96x256x64x4x4",)),
        (128, ("thin_silu_128x256x64x4x4", "thin_gelu_128x256x64x4x4")),
        (160, ("_160x256x64x4x4",)),
        (192, ("hopper_silu_192x128x64x5x4", "_128x256x64x4x4")),
        (384, ("_128x256x64x4x4",)),
        (512, ("_128x128x64x6x4",)),
        (4096, ("_128x256x64x4x4",)),
        (_ANY, ("_128x128x64x6x4",)),
    ),
    "logits": (
        _GEMV,
        (16, ("skinny_logits_16x64x128x4x8", "_16x32x64x8x4")),
        (32, ("skinny_logits_32x64x128x4x8", "_32x64x64x6x4")),
        (64, ("skinny_logits_64x128x128x4x8", "skinny_logits_64x128x64x6x4")),
        (96, ("_96x128x64x7x4",)),
        (128, ("thin_logits_128x128x64x6x4",)),
        (160, ("_160x128x64x5x4",)),
        (192, ("_192x128x64x5x4",)),
        (_ANY, ("_128x256x64x4x4",)),
    ),
}


# Where E4M3 differs.
_FP8_WRITES_HIDDEN: _Ranges = (
    (64, ("tiled8_parts2_64x64x256x4x4",)),
    (96, ("thin8_parts2_96x64x128x10x4", "tiled8_parts2_64x64x128x6x4")),
)
_FP8_PREFERENCES: Mapping[Projection, _Ranges] = {
    "attention_output": (
        (1, ("8x1024x3x4",)),
        (16, ("thin8_plain_16x64x512x5x4",)),
        (32, ("thin8_plain_32x64x512x4x4",)),
        (48, ("thin8_plain_64x64x512x3x4",)),
        *_FP8_WRITES_HIDDEN,
        (128, ("tiled8_parts2_64x64x128x6x4",)),
        (160, ("thin8_parts2_160x64x128x7x4", "tiled8_plain_64x64x128x6x4")),
        (256, ("tiled8_plain_64x64x128x6x4",)),
        (_ANY, ()),
    ),
    "mlp_output": (
        (1, ("8x512x4x2",)),
        (16, ("thin8_parts4_16x64x512x4x4",)),
        (32, ("thin8_parts4_32x64x512x4x4",)),
        (64, ("thin8_parts2_64x64x512x3x4", "tiled8_parts2_64x64x256x4x4")),
        *_FP8_WRITES_HIDDEN,
        (128, ("thin8_parts2_128x64x128x8x4", "tiled8_parts2_64x64x128x6x4")),
        (160, ("thin8_parts2_160x64x128x7x4",)),
        (192, ("thin8_parts2_192x64x128x6x4",)),
        (_ANY, ()),
    ),
    "qkv": (
        (1, ("8x512x4x2",)),
        (32, ()),
        (64, ("thin8_plain_64x64x256x6x4", "plain_64x64x128x8x4")),
        (_ANY, ()),
    ),
    "gate_up": (
        (1, ("16x128x4x4",)),
        (16, ("thin8_silu_16x128x512x3x4", "thin8_gelu_16x128x256x5x4")),
        (32, ("thin8_silu_32x128x256x5x4", "thin8_gelu_32x128x256x5x4")),
        (48, ("thin8_silu_64x128x256x4x4", "thin8_gelu_64x128x256x4x4")),
        (_ANY, ()),
    ),
    "logits": ((_ANY, ()),),
}


def _preferences(
    table: Mapping[Projection, _Ranges], projection: Projection, num_tokens: int
) -> tuple[str, ...]:
    return next(names for limit, names in table[projection] if num_tokens <= limit)
