"""The tiny checkpoints as GGUF files, laid out as llama.cpp's converter lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.reference.tiny_checkpoints import CONFIGS, VOCAB_SIZE, tiny_weights

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA3_NAMES = {
    **_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

# Mistral is stored as llama; its tiny checkpoint has a sliding window, which llama files do not usually name.
GGUF_ARCHITECTURES = ("gemma3", "llama", "mistral", "qwen2", "qwen3")


def write_tiny_gguf(
    architecture: str,
    path: Path,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    **changes: Any,
) -> Path:
    """Writes the checkpoint; matrices in ``quantization``, everything else in float32.

    Args:
        changes: metadata, without the architecture's prefix, to add or (None) to leave out; dots as ``__``.
    """
    name = "llama" if architecture == "mistral" else architecture
    writer = gguf.GGUFWriter(path, name)
    metadata = _metadata(architecture) | {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in metadata.items():
        if value is not None:
            _add(writer, f"{name}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{i}" for i in range(VOCAB_SIZE)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for tensor_name, tensor in _tensors(architecture).items():
        if tensor.ndim == 2 and quantization is not gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor_name, gguf.quantize(tensor, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(tensor_name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(architecture: str) -> dict[str, Any]:
    config = CONFIGS[architecture]
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    rope = config.get("rope_parameters", {})
    metadata: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": config.get("rope_theta", rope.get("rope_theta", 1_000_000.0)),
    }
    if architecture == "mistral":
        metadata["attention.sliding_window"] = config["sliding_window"]
    if architecture == "qwen2":
        metadata["rope.scaling.type"] = "yarn"
        metadata["rope.scaling.factor"] = rope["factor"]
        metadata["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if architecture == "gemma3":
        metadata["attention.sliding_window"] = config["sliding_window"]
        metadata["attention.sliding_window_pattern"] = 3
        metadata["final_logit_softcapping"] = config["final_logit_softcapping"]
        metadata["rope.scaling.type"] = "linear"
        metadata["rope.scaling.factor"] = rope["full_attention"]["factor"]
    return metadata


def _tensors(architecture: str) -> dict[str, NDArray[np.float32]]:
    config = CONFIGS[architecture]
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, tensor in tiny_weights(architecture).items():
        module, kind = name.rsplit(".", 1)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        if architecture in ("llama", "mistral") and module.endswith(("q_proj", "k_proj")):
            key = "num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"
            heads = tensor.reshape(config[key], 2, -1, tensor.shape[-1])
            tensor = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(tensor.shape)
        if module in _TOP:
            tensors[f"{_TOP[module]}.{kind}"] = tensor
        else:
            _, _, layer, rest = module.split(".", 3)
            names = _GEMMA3_NAMES if architecture == "gemma3" else _NAMES
            tensors[f"blk.{layer}.{names[rest]}.{kind}"] = tensor
    if architecture == "llama":
        tensors["rope_freqs.weight"] = _llama3_factors(config)
    return tensors


def _llama3_factors(config: dict[str, Any]) -> NDArray[np.float32]:
    """As llama.cpp's converter computes them, frequency by frequency."""
    scaling = config["rope_scaling"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    length = scaling["original_max_position_embeddings"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (i / head_dim)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(scaling["factor"])
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        assert isinstance(value, float)
        writer.add_float32(key, value)
