from __future__ import annotations

from typing import Any

import pytest

from engine_runtime.executors.memory_plan import MemoryPlan, MemoryPlanError, make_plan
from tests.engine_runtime.tiny_configs import tiny_config

_CONFIG = tiny_config("llama")
_GIB = 1 << 30


def _plan(**changes: Any) -> MemoryPlan:
    arguments: dict[str, Any] = {
        "weight_bytes": 1000,
        "load_bytes": 500,
        "activation_bytes": 2000,
        "block_size": 16,
        "kv_dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 3,
        "kv_cache_bytes": None,
        "available_bytes": _GIB,
    }
    return make_plan(_CONFIG, **(arguments | changes))


def test_block_holds_keys_and_values_of_all_layers() -> None:
    padded = -(-_CONFIG.head_dim // 16) * 16
    expected = 4 * _CONFIG.num_hidden_layers * 16 * _CONFIG.num_key_value_heads * (_CONFIG.head_dim + padded)
    assert _plan().block_bytes == expected


def test_float16_halves_a_block() -> None:
    assert 2 * _plan(kv_dtype="float16").block_bytes == _plan().block_bytes


def test_default_pool_is_no_larger_than_all_sequences_need() -> None:
    plan = _plan()
    assert plan.num_blocks == 3 * 64 // 16
    assert plan.num_full_sequences == 3


def test_default_pool_is_a_part_of_a_small_memory() -> None:
    block = _plan().block_bytes
    plan = _plan(available_bytes=20 * block, max_num_seqs=1000)
    assert plan.num_blocks == 6


def test_given_pool_is_taken_in_whole_blocks() -> None:
    block = _plan().block_bytes
    assert _plan(kv_cache_bytes=10 * block + block // 2).num_blocks == 10


def test_length_shrinks_to_the_memory_if_neither_it_nor_the_pool_was_asked_for() -> None:
    block = _plan().block_bytes
    plan = _plan(max_model_len=None, available_bytes=20 * block, weight_bytes=0, activation_bytes=0)
    assert plan.num_blocks == 6
    assert plan.max_model_len == 96 < _CONFIG.max_position_embeddings


def test_a_pool_that_was_asked_for_must_hold_the_length_that_the_model_claims() -> None:
    with pytest.raises(MemoryPlanError, match="--max-model-len"):
        _plan(max_model_len=None, kv_cache_bytes=3 * _plan().block_bytes)


def test_length_that_was_asked_for_must_fit() -> None:
    block = _plan().block_bytes
    assert _plan(kv_cache_bytes=4 * block).num_full_sequences == 1
    with pytest.raises(MemoryPlanError, match="one sequence of 64 tokens") as error:
        _plan(kv_cache_bytes=4 * block - 1)
    assert "3 blocks x 16 tokens" in str(error.value)


@pytest.mark.parametrize("part", ["weight_bytes", "activation_bytes", "load_bytes"])
def test_too_little_memory_is_refused_with_the_table(part: str) -> None:
    with pytest.raises(MemoryPlanError, match="are needed") as error:
        _plan(**{part: 2 * _GIB})
    assert "weights" in str(error.value)
    assert "1,024.0 MiB" in str(error.value)


def test_table_names_each_purpose() -> None:
    lines = _plan(weight_bytes=3 << 20).table().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["weights", "activations", "KV cache", "available"]
    assert "3.0 MiB" in lines[0]
    assert "12 blocks x 16 tokens = 192 tokens, 3.0 sequences of 64" in lines[2]
