"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with biased queries, keys and values (``has_qkv_bias``)."""

from engine_runtime.models.llama import after_attention, before_attention, logits

__all__ = ["after_attention", "before_attention", "logits"]
