"""A ``ModelConfig`` cannot contradict itself."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine_runtime.model_config import ConfigError, LayerConfig
from engine_runtime.rope import FrequencyFactors, RopeConfig
from tests.engine_runtime.tiny_configs import tiny_config


def test_widths_of_the_merged_projection() -> None:
    config = tiny_config("llama")
    assert (config.q_size, config.kv_size, config.qkv_size) == (128, 64, 256)


def test_equal_configurations_are_one_key() -> None:
    assert {tiny_config("llama"): 1}[tiny_config("llama")] == 1
    assert tiny_config("llama") != tiny_config("llama", rms_norm_eps=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; expected 1 to 4194304"),
        ({"vocab_size": 1 << 31}, "vocab_size is 2147483648"),
        ({"intermediate_size": -5}, "intermediate_size is -5"),
        ({"num_hidden_layers": 1025}, "the number of layers is 1025; expected 1 to 1024"),
        ({"num_hidden_layers": 3}, "2 layer kinds for 3 layers"),
        (
            {"num_key_value_heads": 3},
            r"num_attention_heads \(4\) is no multiple of num_key_value_heads \(3\)",
        ),
        ({"head_dim": 15}, "head_dim is 15; rotary embeddings need an even one"),
        ({"layers": (LayerConfig(RopeConfig(1.0)),) * 2}, "theta of the rotary embedding is 1.0"),
        ({"layers": (LayerConfig(RopeConfig(math.nan)),) * 2}, "theta of the rotary embedding is nan"),
        (
            {"layers": (LayerConfig(RopeConfig(1e4, FrequencyFactors((1.0,) * 15))),) * 2},
            "needs 16 frequency factors above 0",
        ),
        (
            {"layers": (LayerConfig(RopeConfig(1e4, FrequencyFactors((0.0,) * 16))),) * 2},
            "needs 16 frequency factors above 0",
        ),
        ({"bos_token_id": 176}, "bos_token_id is 176, outside the vocabulary of 176"),
        ({"eos_token_ids": (2, -1)}, r"eos_token_ids is \(2, -1\), outside the vocabulary"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config("llama", **changes)
