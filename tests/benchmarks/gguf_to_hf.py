"""Writes the weights of a llama GGUF as a folder in Hugging Face format, for servers that read no GGUF.

The weights are the dequantized ones, in bfloat16, so that all servers of the benchmark compute one model.
Deliberately independent of ``engine_runtime``: a peer that talks sense on this folder is a second opinion on
how the GGUF has to be read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of a special token
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def write_hf_folder(gguf_path: Path, folder: Path, *, int8: bool = False) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer files into ``folder``.

    Args:
        int8: the projections of the layers as int8 with one scale a row, in compressed-tensors' W8A8 format
            (activations are quantized token by token as the server runs); everything else stays bfloat16.

    Raises:
        ValueError: the architecture is not ``llama`` or the pre-tokenizer is not ``smollm``.
    """
    reader = GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"{gguf_path.name}: only llama models with the smollm tokenizer are converted")
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(_weights(reader, fields))
    config = _config(fields, tied="lm_head.weight" not in weights)
    if int8:
        weights = dict(_quantized(weights))
        config["quantization_config"] = W8A8
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    eos = fields["tokenizer.ggml.eos_token_id"]
    _write_json(
        folder / "generation_config.json", {"eos_token_id": eos, "bos_token_id": config["bos_token_id"]}
    )
    _write_tokenizer(fields, folder)
    _write_json(folder / "config.json", config)  # last: a folder with a config is a whole one


def _weights(reader: GGUFReader, fields: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        values = dequantize(tensor.data, tensor.tensor_type).astype(ml_dtypes.bfloat16)
        if stem in TOP_NAMES:
            yield f"{TOP_NAMES[stem]}.weight", values
            continue
        _, layer, part = stem.split(".")
        if part in heads:
            values = _half_rotation_rows(values, heads[part])
        yield f"model.layers.{layer}.{LAYER_NAMES[part]}.weight", np.ascontiguousarray(values)


def _half_rotation_rows(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's interleaving of the rows [heads * d, in] that the rotary embedding pairs."""
    rows, columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _quantized(weights: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for name, values in weights.items():
        if not name.endswith("_proj.weight"):
            yield name, values
            continue
        exact = values.astype(np.float32)
        scale = np.abs(exact).max(axis=1, keepdims=True) / 127
        yield name, np.round(exact / scale).astype(np.int8)
        yield f"{name}_scale", scale.astype(ml_dtypes.bfloat16)


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    hidden_size = fields["llama.embedding_length"]
    num_heads = fields["llama.attention.head_count"]
    rope_theta = float(fields["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def write_tokenizer(gguf_path: Path, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json; the pre-tokenizer must be ``smollm``."""
    reader = GGUFReader(gguf_path)
    _write_tokenizer({name: field.contents() for name, field in reader.fields.items()}, folder)


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # The smollm pre-tokenizer: every digit alone, then GPT-2's expression on bytes.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
            "model_max_length": fields["llama.context_length"],
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
