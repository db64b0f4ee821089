"""The smallest models that can be loaded, in both formats, and ways to break their files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from tests.robustness.json_mutations import changed_bytes, mutated

_VOCAB = [*map(chr, range(33, 97)), "AB", "<s>", "</s>", "<unk>"]
_HIDDEN, _HEADS, _FFN = 8, 2, 16
_CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": _HIDDEN,
    "intermediate_size": _FFN, "num_hidden_layers": 1, "num_attention_heads": _HEADS,
    "num_key_value_heads": 1, "vocab_size": len(_VOCAB), "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "bos_token_id": 65, "eos_token_id": [66], "tie_word_embeddings": True, "hidden_act": "silu",
    "rope_theta": 10000.0, "attention_bias": False, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
_SHAPES = {
    "model.embed_tokens": (len(_VOCAB), _HIDDEN),
    "model.norm": (_HIDDEN,),
    "model.layers.0.input_layernorm": (_HIDDEN,),
    "model.layers.0.post_attention_layernorm": (_HIDDEN,),
    "model.layers.0.self_attn.q_proj": (_HIDDEN, _HIDDEN),
    "model.layers.0.self_attn.k_proj": (_HIDDEN // _HEADS, _HIDDEN),
    "model.layers.0.self_attn.v_proj": (_HIDDEN // _HEADS, _HIDDEN),
    "model.layers.0.self_attn.o_proj": (_HIDDEN, _HIDDEN),
    "model.layers.0.mlp.gate_proj": (_FFN, _HIDDEN),
    "model.layers.0.mlp.up_proj": (_FFN, _HIDDEN),
    "model.layers.0.mlp.down_proj": (_HIDDEN, _FFN),
}
_GGUF_NAMES = dict(
    zip(
        _SHAPES,
        ("token_embd", "output_norm", *(f"blk.0.{name}" for name in (
            "attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
            "ffn_down",
        ))),
        strict=True,
    )
)  # fmt: skip
# What a length, a count or an offset may be that somebody made up.
_NUMBERS = (0, 1, 2, 3, 7, 8, 9, 12, 31, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62,
            2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)  # fmt: skip


def safetensors_file() -> bytes:
    return bytes(save({f"{name}.weight": np.ones(shape, np.float32) for name, shape in _SHAPES.items()}))


def config_json() -> dict[str, Any]:
    return _CONFIG


def gguf_file(path: Path, kind: str) -> bytes:
    """A whole model; its tokenizer of the kind ``gpt2`` or ``llama``. Written to ``path`` on the way."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_FFN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(_VOCAB)
    writer.add_token_types([1] * (len(_VOCAB) - 3) + [3] * 3)
    if kind == "gpt2":
        writer.add_tokenizer_pre("default")
        writer.add_token_merges(["A B"])
    else:
        writer.add_token_scores([-float(i) for i in range(len(_VOCAB))])
    writer.add_bos_token_id(65)
    writer.add_eos_token_id(66)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    for name, shape in _SHAPES.items():
        writer.add_tensor(f"{_GGUF_NAMES[name]}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def tokenizer_json() -> dict[str, Any]:
    """One with a part of every sort."""
    model = models.BPE(
        vocab={token: number for number, token in enumerate(_VOCAB)}, merges=[("A", "B")], unk_token="<unk>"
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "_")])
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 65)])
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>", normalized=False)])
    value: dict[str, Any] = json.loads(backend.to_str())
    return value


def changed_safetensors(data: bytes, chance: random.Random) -> bytes:
    """The header's JSON, its length, or any bytes changed."""
    length = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + length], data[8 + length :]
    if chance.random() < 0.7:
        header = mutated(json.loads(header), chance)
        header = header.ljust(length) if chance.random() < 0.5 else header
    claimed = len(header)
    if chance.random() < 0.1:
        claimed = chance.choice(_NUMBERS)
    whole = claimed.to_bytes(8, "little") + header + tensors
    return changed_bytes(whole, chance) if chance.random() < 0.2 else whole


def changed_gguf(data: bytes, header_size: int, chance: random.Random) -> bytes:
    """One to three numbers or bytes of the header changed."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(header_size)
        match chance.randrange(4):
            case 0:
                changed[at : at + 8] = chance.choice(_NUMBERS).to_bytes(8, "little")
            case 1:
                changed[at : at + 4] = (chance.choice(_NUMBERS) & 0xFFFFFFFF).to_bytes(4, "little")
            case 2 if at < len(changed):
                changed[at] = chance.randrange(256)
            case _:
                head = changed_bytes(bytes(changed[:header_size]), chance)
                changed[:header_size] = head
    return bytes(changed)
