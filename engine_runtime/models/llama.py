"""Llama 1 to 3 and everything that copied it (arXiv:2302.13971, arXiv:2407.21783)."""

from __future__ import annotations

from engine_runtime.model_config import ModelConfig
from engine_runtime.models.layers import (
    add,
    gated_mlp,
    output_logits,
    output_projection,
    qkv_projection,
    rms_norm,
)
from engine_runtime.models.segment_builder import SegmentBuilder, Value


def before_attention(b: SegmentBuilder, config: ModelConfig, layer: str, residual: Value) -> Value:
    """[T, H] -> [T, q + 2 kv]."""
    hidden = rms_norm(b, f"{layer}.input_layernorm", residual, config.hidden_size, config.rms_norm_eps)
    return qkv_projection(b, config, f"{layer}.self_attn", hidden)


def after_attention(
    b: SegmentBuilder, config: ModelConfig, layer: str, attention: Value, residual: Value
) -> Value:
    """[T, q], [T, H] -> [T, H]."""
    residual = add(b, f"{layer}.self_attn", residual, output_projection(b, config, layer, attention))
    norm = f"{layer}.post_attention_layernorm"
    hidden = rms_norm(b, norm, residual, config.hidden_size, config.rms_norm_eps)
    return add(b, f"{layer}.mlp", residual, gated_mlp(b, config, layer, hidden))


def logits(b: SegmentBuilder, config: ModelConfig, residual: Value) -> Value:
    """[R, H] -> [R, V] float32."""
    hidden = rms_norm(b, "norm", residual, config.hidden_size, config.rms_norm_eps)
    return output_logits(b, config, hidden)
