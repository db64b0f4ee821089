"""Which tensors a checkpoint of a given configuration holds."""

from __future__ import annotations

from engine_runtime.model_config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape, projections as [out, in], with ``lm_head.weight`` even if it is tied."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for norm in _layer_norms(config.architecture):
            shapes[f"{layer}.{norm}.weight"] = (hidden,)
        attention = f"{layer}.self_attn"
        for name, out in (("q", config.q_size), ("k", config.kv_size), ("v", config.kv_size)):
            shapes[f"{attention}.{name}_proj.weight"] = (out, hidden)
            if config.has_qkv_bias:
                shapes[f"{attention}.{name}_proj.bias"] = (out,)
        shapes[f"{attention}.o_proj.weight"] = (hidden, config.q_size)
        if config.has_o_bias:
            shapes[f"{attention}.o_proj.bias"] = (hidden,)
        if config.architecture in ("qwen3", "gemma3"):
            shapes[f"{attention}.q_norm.weight"] = (config.head_dim,)
            shapes[f"{attention}.k_norm.weight"] = (config.head_dim,)
        for name, shape in (
            ("gate", (intermediate, hidden)),
            ("up", (intermediate, hidden)),
            ("down", (hidden, intermediate)),
        ):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
            if config.has_mlp_bias:
                shapes[f"{layer}.mlp.{name}_proj.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def is_norm(name: str) -> bool:
    """Whether the tensor is the weight of an RMSNorm."""
    return name.endswith("norm.weight")


def _layer_norms(architecture: str) -> tuple[str, ...]:
    norms = ("input_layernorm", "post_attention_layernorm")
    if architecture == "gemma3":
        return (*norms, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    return norms
