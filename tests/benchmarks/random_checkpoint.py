"""Writes a checkpoint of a given shape with random weights: ``python -m tests.benchmarks.random_checkpoint
FOLDER``, for benchmarks that need a model too large to keep.

The tokenizer is the default model's, with further words up to the vocabulary's size.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from engine_runtime.model_config import ModelConfig
from server.model_source import fetch_default_model
from tests.benchmarks.gguf_to_hf import write_tokenizer
from tests.benchmarks.gpu_engine import LLAMA_8B

_PERIOD = 16_777_213  # prime, so that rows differ


def write_random_checkpoint(config: ModelConfig, folder: Path) -> None:
    """Writes config.json, one .safetensors file a layer, and the tokenizer's files; bfloat16, llama."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(_PERIOD, dtype=np.float32)
    blocks = {
        width: (normal * width**-0.5).astype(ml_dtypes.bfloat16).tobytes()
        for width in {config.hidden_size, config.q_size, config.intermediate_size}
    }
    files: dict[str, str] = {}
    for name, tensors in _files(config):
        _write_safetensors(folder / name, tensors, blocks)
        files |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(fetch_default_model(), folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"Ġword{i}": i for i in range(len(vocab), config.vocab_size)}
    path.write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": config.num_hidden_layers,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "head_dim": config.head_dim,
                "vocab_size": config.vocab_size,
                "max_position_embeddings": config.max_position_embeddings,
                "rms_norm_eps": config.rms_norm_eps,
                "rope_theta": config.layers[0].rope.theta,
                "tie_word_embeddings": config.tie_word_embeddings,
                "hidden_act": "silu",
                "torch_dtype": "bfloat16",
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
        )
    )


def _files(config: ModelConfig) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    hidden, gated = config.hidden_size, config.intermediate_size
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        yield (
            f"layer-{i:03}.safetensors",
            {
                f"{layer}self_attn.q_proj.weight": (config.q_size, hidden),
                f"{layer}self_attn.k_proj.weight": (config.kv_size, hidden),
                f"{layer}self_attn.v_proj.weight": (config.kv_size, hidden),
                f"{layer}self_attn.o_proj.weight": (hidden, config.q_size),
                f"{layer}mlp.gate_proj.weight": (gated, hidden),
                f"{layer}mlp.up_proj.weight": (gated, hidden),
                f"{layer}mlp.down_proj.weight": (hidden, gated),
                f"{layer}input_layernorm.weight": (hidden,),
                f"{layer}post_attention_layernorm.weight": (hidden,),
            },
        )
    yield (
        "rest.safetensors",
        {
            "model.embed_tokens.weight": (config.vocab_size, hidden),
            "lm_head.weight": (config.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        },
    )


def _write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], blocks: dict[int, bytes]) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            left = 2 * int(np.prod(shape))
            if len(shape) == 1:
                file.write(np.ones(shape, ml_dtypes.bfloat16).tobytes())
                continue
            block = blocks[shape[1]]
            while left:
                file.write(memoryview(block)[:left])
                left -= min(left, len(block))


if __name__ == "__main__":
    write_random_checkpoint(LLAMA_8B, Path(sys.argv[1]))
