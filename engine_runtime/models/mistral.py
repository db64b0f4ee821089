"""Mistral 7B and its kin (arXiv:2310.06825): Llama with a sliding window, which only attention sees."""

from engine_runtime.models.llama import after_attention, before_attention, logits

__all__ = ["after_attention", "before_attention", "logits"]
