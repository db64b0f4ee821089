"""Small random models, one an architecture, that anybody can make again bit for bit: nothing large is stored.

Used both by ``record``, which runs them through transformers, and by the tests. The configurations mix the
spellings of transformers 4 and 5, and each uses what is special about its architecture.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

VOCAB_SIZE = 256

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **_SHAPE,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        **_SHAPE,
        "head_dim": 24,
        "sliding_window": 12,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        **_SHAPE,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        **_SHAPE,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        **_SHAPE,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 6.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 10,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
    },
}


def write_tiny_checkpoint(architecture: str, folder: Path) -> Path:
    """Writes config.json and model.safetensors (float32) and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[architecture]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tiny_weights(architecture), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_weights(architecture: str) -> dict[str, NDArray[np.float32]]:
    """The weights as the checkpoint stores them.

    Large enough for attention to be picky and for logits to lie far apart.
    """
    config = CONFIGS[architecture]
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    num_q, num_kv = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // num_q)
    is_gemma = architecture == "gemma3"
    # The legacy generator: its streams are frozen, those of numpy.random.Generator may change.
    random = np.random.RandomState(sorted(CONFIGS).index(architecture))

    def normal(*shape: int, scale: float) -> NDArray[np.float32]:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    def projection(out: int, size: int) -> NDArray[np.float32]:
        return normal(out, size, scale=1.3 / math.sqrt(size))

    def norm(size: int) -> NDArray[np.float32]:
        return normal(size, scale=0.3) + np.float32(0 if is_gemma else 1)

    weights = {"model.embed_tokens.weight": normal(VOCAB_SIZE, hidden, scale=0.05 if is_gemma else 1.0)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norms = ["input_layernorm", "post_attention_layernorm"]
        if is_gemma:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in norms:
            weights[f"{layer}.{name}.weight"] = norm(hidden)
        for name, heads in (("q", num_q), ("k", num_kv), ("v", num_kv)):
            weights[f"{layer}.self_attn.{name}_proj.weight"] = projection(heads * head_dim, hidden)
            if architecture == "qwen2":
                weights[f"{layer}.self_attn.{name}_proj.bias"] = normal(heads * head_dim, scale=0.5)
        if architecture in ("qwen3", "gemma3"):
            weights[f"{layer}.self_attn.q_norm.weight"] = norm(head_dim)
            weights[f"{layer}.self_attn.k_norm.weight"] = norm(head_dim)
        weights[f"{layer}.self_attn.o_proj.weight"] = projection(hidden, num_q * head_dim)
        weights[f"{layer}.mlp.gate_proj.weight"] = projection(intermediate, hidden)
        weights[f"{layer}.mlp.up_proj.weight"] = projection(intermediate, hidden)
        weights[f"{layer}.mlp.down_proj.weight"] = projection(hidden, intermediate)
    # Of random sign, or a tied head would answer every token with itself.
    weights["model.norm.weight"] = normal(hidden, scale=2.0) - np.float32(1 if is_gemma else 0)
    if not config.get("tie_word_embeddings", True):
        weights["lm_head.weight"] = projection(VOCAB_SIZE, hidden)
    return weights


def tiny_prompts() -> list[list[int]]:
    """Token ids; the longest go far beyond every sliding window and every original context length."""
    random = np.random.RandomState(7)
    return [random.randint(3, VOCAB_SIZE, size=length).tolist() for length in (1, 9, 33, 150)]
