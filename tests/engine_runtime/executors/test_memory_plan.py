from __future__ import annotations

from typing import Any

import pytest

from engine_runtime.executors.memory_plan import MemoryPlan, MemoryPlanError, make_plan

_GIB = 1 << 30
_BLOCK = 1 << 20


def _plan(**changes: Any) -> MemoryPlan:
    arguments: dict[str, Any] = {
        "weight_bytes": 1000,
        "load_bytes": 500,
        "activation_bytes": 2000,
        "block_size": 16,
        "block_bytes": _BLOCK,
        "kv_limit_bytes": _GIB // 2,
        "claimed_len": 256,
        "max_model_len": 64,
        "max_num_seqs": 3,
        "kv_cache_bytes": None,
        "available_bytes": _GIB,
    }
    return make_plan(**(arguments | changes))


def test_default_pool_is_no_larger_than_all_sequences_need() -> None:
    plan = _plan()
    assert plan.num_blocks == 3 * 64 // 16
    assert plan.num_full_sequences == 3


def test_default_pool_keeps_to_its_limit() -> None:
    plan = _plan(kv_limit_bytes=6 * _BLOCK + _BLOCK // 2, max_num_seqs=1000)
    assert plan.num_blocks == 6


def test_given_pool_is_taken_in_whole_blocks() -> None:
    assert _plan(kv_cache_bytes=10 * _BLOCK + _BLOCK // 2).num_blocks == 10


def test_length_shrinks_to_the_memory_if_neither_it_nor_the_pool_was_asked_for() -> None:
    plan = _plan(max_model_len=None, kv_limit_bytes=6 * _BLOCK)
    assert plan.num_blocks == 6
    assert plan.max_model_len == 96 < 256


def test_a_pool_that_was_asked_for_must_hold_the_length_that_the_model_claims() -> None:
    with pytest.raises(MemoryPlanError, match="--max-model-len"):
        _plan(max_model_len=None, kv_cache_bytes=3 * _BLOCK)


def test_length_that_was_asked_for_must_fit() -> None:
    assert _plan(kv_cache_bytes=4 * _BLOCK).num_full_sequences == 1
    with pytest.raises(MemoryPlanError, match="one sequence of 64 tokens") as error:
        _plan(kv_cache_bytes=4 * _BLOCK - 1)
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


def test_a_length_beyond_the_models_own_is_refused() -> None:
    assert _plan(max_model_len=256).max_model_len == 256
    with pytest.raises(MemoryPlanError, match="257 is more than the 256 tokens"):
        _plan(max_model_len=257)
