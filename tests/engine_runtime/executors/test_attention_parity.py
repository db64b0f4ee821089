"""Where attention takes as long as the products, counted by hand for a known model."""

from __future__ import annotations

from dataclasses import replace

from engine_runtime.executors.attention_parity import attention_parity
from tests.engine_runtime.tiny_configs import tiny_config


def test_it_is_where_both_take_as_many_operations() -> None:
    model = tiny_config("llama")  # per token: qkv 64 x 256, output 128 x 64, gate, up and down 64 x 112
    products = 64 * 256 + 128 * 64 + 3 * 64 * 112
    assert attention_parity(model, 1.0) == products // (2 * 128)
    assert attention_parity(model, 4.0) == products // (2 * 128 * 4)


def test_layers_with_a_window_do_not_count() -> None:
    model = tiny_config("llama")
    full = model.layers[0]
    windowed = replace(full, sliding_window=16)
    half = tiny_config("llama", layers=(full, windowed))
    assert attention_parity(half, 1.0) == 2 * attention_parity(model, 1.0)
    assert attention_parity(tiny_config("llama", layers=(windowed, windowed)), 1.0) == 0
