"""Gemma 3, the text decoder (arXiv:2503.19786).

Every block is normalized before and after ("sandwich"), query and key heads are normalized, the MLP's gate
is a GELU. Norm weights arrive as the factor itself (1 + the number in the Hugging Face checkpoint) and, as in
the original, scale in float32.
"""

from __future__ import annotations

from engine_runtime.model_config import ModelConfig
from engine_runtime.models.layers import (
    add,
    gated_mlp,
    norm_query_key_heads,
    output_logits,
    output_projection,
    qkv_projection,
    rms_norm_float32,
)
from engine_runtime.models.segment_builder import SegmentBuilder, Value


def before_attention(b: SegmentBuilder, config: ModelConfig, layer: str, residual: Value) -> Value:
    """[T, H] -> [T, q + 2 kv]."""
    hidden = _norm(b, config, f"{layer}.input_layernorm", residual)
    qkv = qkv_projection(b, config, f"{layer}.self_attn", hidden)
    return norm_query_key_heads(b, config, f"{layer}.self_attn", qkv, in_float32=True)


def after_attention(
    b: SegmentBuilder, config: ModelConfig, layer: str, attention: Value, residual: Value
) -> Value:
    """[T, q], [T, H] -> [T, H]."""
    hidden = output_projection(b, config, layer, attention)
    hidden = _norm(b, config, f"{layer}.post_attention_layernorm", hidden)
    residual = add(b, f"{layer}.self_attn", residual, hidden)
    hidden = _norm(b, config, f"{layer}.pre_feedforward_layernorm", residual)
    hidden = gated_mlp(b, config, layer, hidden, activation="gelu_tanh")
    hidden = _norm(b, config, f"{layer}.post_feedforward_layernorm", hidden)
    return add(b, f"{layer}.mlp", residual, hidden)


def logits(b: SegmentBuilder, config: ModelConfig, residual: Value) -> Value:
    """[R, H] -> [R, V] float32."""
    return output_logits(b, config, _norm(b, config, "norm", residual))


def _norm(b: SegmentBuilder, config: ModelConfig, path: str, x: Value) -> Value:
    return rms_norm_float32(b, path, x, config.hidden_size, config.rms_norm_eps)
