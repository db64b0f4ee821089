"""A small configuration of each architecture, for tests that look at graphs and not at numbers."""

from __future__ import annotations

from engine_runtime.model_config import LayerConfig, ModelConfig
from engine_runtime.rope import RopeConfig


def tiny_config(architecture: str, **changes: object) -> ModelConfig:
    """Two layers, dimensions that are multiples of 16 and all different."""
    values: dict[str, object] = {
        "architecture": architecture,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 176,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_scale": 32**-0.5,
        "layers": (LayerConfig(RopeConfig(10_000.0)),) * 2,
        "has_qkv_bias": architecture == "qwen2",
        "final_logit_softcap": 30.0 if architecture == "gemma3" else None,
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]
