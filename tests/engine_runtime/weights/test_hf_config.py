"""Configurations as they are published, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from engine_runtime.model_config import ConfigError, LayerConfig
from engine_runtime.rope import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from engine_runtime.weights.hf_config import read_hf_config

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}

MISTRAL_7B_V01: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}

QWEN2_5_0_5B: dict[str, Any] = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

QWEN3_0_6B: dict[str, Any] = {
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# As published: almost everything is left to the defaults of the configuration class.
GEMMA_3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}


def test_llama_3_1() -> None:
    config = read_hf_config(LLAMA_3_1_8B)
    assert (config.architecture, config.num_hidden_layers, config.head_dim) == ("llama", 32, 128)
    assert (config.q_size, config.kv_size, config.qkv_size) == (4096, 1024, 6144)
    assert config.layers == (LayerConfig(RopeConfig(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))),) * 32
    assert config.attention_scale == pytest.approx(128**-0.5)
    assert (config.eos_token_ids, config.bos_token_id) == ((128001, 128008, 128009), 128000)
    flags = (config.tie_word_embeddings, config.has_qkv_bias, config.has_o_bias, config.has_mlp_bias)
    assert flags == (False, False, False, False)


def test_mistral_slides_in_every_layer() -> None:
    config = read_hf_config(MISTRAL_7B_V01)
    assert config.layers == (LayerConfig(RopeConfig(10000.0), 4096),) * 32
    unlimited = read_hf_config(MISTRAL_7B_V01 | {"sliding_window": None, "head_dim": 96})
    assert unlimited.layers[0].sliding_window is None
    assert unlimited.head_dim == 96


def test_qwen2_has_biases_and_slides_only_if_told_so() -> None:
    config = read_hf_config(QWEN2_5_0_5B)
    assert (config.has_qkv_bias, config.has_o_bias, config.head_dim) == (True, False, 64)
    assert {layer.sliding_window for layer in config.layers} == {None}
    sliding = read_hf_config(QWEN2_5_0_5B | {"use_sliding_window": True})
    assert [layer.sliding_window for layer in sliding.layers] == [None] * 21 + [32768] * 3


def test_qwen3() -> None:
    config = read_hf_config(QWEN3_0_6B)
    assert (config.head_dim, config.q_size, config.has_qkv_bias) == (128, 2048, False)
    assert config.layers[0].rope == RopeConfig(1000000.0)
    biased = read_hf_config(QWEN3_0_6B | {"attention_bias": True})
    assert (biased.has_qkv_bias, biased.has_o_bias) == (True, True)


def test_gemma3_text_model_of_a_multimodal_checkpoint() -> None:
    config = read_hf_config(GEMMA_3_4B)
    assert (config.architecture, config.vocab_size, config.head_dim) == ("gemma3", 262208, 256)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert config.embedding_scale == pytest.approx(2560**0.5)
    assert config.attention_scale == pytest.approx(1 / 16)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (1, 106)
    local = LayerConfig(RopeConfig(10000.0), 1024)
    assert config.layers[:6] == (local,) * 5 + (LayerConfig(RopeConfig(1000000.0, LinearScaling(8.0))),)
    assert [i for i, layer in enumerate(config.layers) if layer.sliding_window is None] == [5, 11, 17, 23, 29]


def test_both_spellings_of_gemma3_are_one_model() -> None:
    text = GEMMA_3_4B["text_config"]
    kinds = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(34)]
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    new = {key: value for key, value in text.items() if key != "rope_scaling"}
    assert read_hf_config(new | {"layer_types": kinds, "rope_parameters": ropes}) == read_hf_config(text)
    assert read_hf_config(text | {"sliding_window_pattern": 2}).layers[1].sliding_window is None


def test_both_spellings_of_llama_are_one_model() -> None:
    old = {key: value for key, value in LLAMA_3_1_8B.items() if key not in ("rope_theta", "rope_scaling")}
    rope = {"rope_theta": 500000.0, **LLAMA_3_1_8B["rope_scaling"]}
    assert read_hf_config(old | {"rope_parameters": rope}) == read_hf_config(LLAMA_3_1_8B)


def test_yarn_of_qwen() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read_hf_config(QWEN2_5_0_5B | {"rope_scaling": scaling})
    expected = YarnScaling(4.0, 32768, 32.0, 1.0, attention_factor=0.1 * 1.3862943611198906 + 1)
    assert config.layers[0].rope.scaling == expected


def test_generation_config_adds_its_end_tokens() -> None:
    config = read_hf_config(QWEN2_5_0_5B, {"eos_token_id": [151645, 151643]})
    assert config.eos_token_ids == (151645, 151643)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba"},
            "'mamba' is not supported; supported are gemma3, llama, mistral, qwen2, qwen3",
        ),
        ({"model_type": None}, "no field 'model_type'"),
        ({"model_type": 3}, "model_type is 3; expected a string"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "own Python code"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantized with gptq, which is not supported; supported are FP8 weights",
        ),
        ({"hidden_size": None}, "no field 'hidden_size'"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; expected an integer"),
        ({"hidden_size": True}, "hidden_size is True; expected an integer"),
        ({"hidden_size": 4100}, r"hidden_size \(4100\) is no multiple of num_attention_heads \(32\)"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 5}, "no multiple of"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"head_dim": 0}, "head_dim is 0; expected an integer above 0"),
        ({"hidden_size": -4096}, "hidden_size is -4096; expected an integer above 0"),
        ({"vocab_size": 2**63}, "vocab_size is 9223372036854775808; expected an integer"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*; expected a finite number"),
        ({"head_dim": 63}, "head_dim is 63; rotary embeddings need an even one"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648; expected 1 to"),
        ({"num_hidden_layers": 10**9}, "the number of layers is 1000000000; expected 1 to 1024"),
        ({"num_hidden_layers": -1}, "the number of layers is -1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0; expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a finite number"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; llama is supported with 'silu' only"),
        ({"eos_token_id": 128256}, "outside the vocabulary of 128256"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is .* expected a token id or a list"),
        ({"partial_rotary_factor": 0.5}, "rotated in part"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "'longrope' is not supported; supported are default, linear",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "no field 'factor'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object"),
        ({"rope_scaling": {**LLAMA_3_1_8B["rope_scaling"], "high_freq_factor": 1.0}}, "must be above"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_hf_config(LLAMA_3_1_8B | changes)


def test_layer_types_must_fit_the_layers() -> None:
    with pytest.raises(ConfigError, match="for each of 28 layers"):
        read_hf_config(QWEN3_0_6B | {"layer_types": ["full_attention"]})
    with pytest.raises(ConfigError, match="layer_types must name"):
        read_hf_config(QWEN3_0_6B | {"layer_types": ["linear_attention"] * 28})


def test_encoders_are_refused() -> None:
    text = GEMMA_3_4B["text_config"] | {"use_bidirectional_attention": True}
    with pytest.raises(ConfigError, match="encoder"):
        read_hf_config(text)
