"""Qwen3, dense (arXiv:2505.09388): Llama with normalized query and key heads."""

from __future__ import annotations

from engine_runtime.model_config import ModelConfig
from engine_runtime.models import llama
from engine_runtime.models.layers import norm_query_key_heads
from engine_runtime.models.llama import after_attention, logits
from engine_runtime.models.segment_builder import SegmentBuilder, Value

__all__ = ["after_attention", "before_attention", "logits"]


def before_attention(b: SegmentBuilder, config: ModelConfig, layer: str, residual: Value) -> Value:
    """[T, H] -> [T, q + 2 kv]."""
    qkv = llama.before_attention(b, config, layer, residual)
    return norm_query_key_heads(b, config, f"{layer}.self_attn", qkv)
