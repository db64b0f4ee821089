from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from engine_runtime.executors.onnxruntime import factory
from engine_runtime.executors.onnxruntime.factory import plan_cpu_memory
from engine_runtime.executors.onnxruntime.vnni_tiles import has_vnni
from engine_runtime.factory import (
    CheckpointError,
    DeviceError,
    MemoryPlanError,
    RuntimeConfig,
    create_executor,
)
from engine_runtime.weights.checkpoint import open_checkpoint
from tests.engine_runtime.executors.generation import generate, tokens
from tests.reference.recordings import load_recordings
from tests.reference.tiny_checkpoints import CONFIGS, write_tiny_checkpoint


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_every_architecture_generates_what_transformers_does(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(architecture, tmp_path)
    executor, _ = create_executor(RuntimeConfig(path, dtype="float32", max_num_batched_tokens=64))
    recordings = load_recordings(architecture)
    prompts = [recording.prompt_token_ids for recording in recordings]
    results, _ = generate(executor, prompts, len(recordings[0].token_ids))
    for recording, generated in zip(recordings, tokens(results), strict=True):
        assert recording.check_tokens(generated, 1e-4) > 0
    executor.shutdown()


@pytest.mark.parametrize(("is_exact", "dtype"), [(True, "int8"), (False, "float32")])
def test_auto_is_int8_where_its_sums_are_exact(
    is_exact: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "multiplies_int8_exactly", lambda: is_exact)
    config = RuntimeConfig(write_tiny_checkpoint("llama", tmp_path), max_num_batched_tokens=32)
    executor, _ = create_executor(config)
    assert executor.spec.device.endswith(f", {dtype})")
    executor.shutdown()


def test_the_device_is_named_and_loading_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "multiplies_int8_exactly", lambda: True)
    path = write_tiny_checkpoint("llama", tmp_path)
    stages: list[tuple[str, int, int]] = []
    config = RuntimeConfig(path, max_num_seqs=3, max_num_batched_tokens=32, num_threads=1)
    executor, plan = create_executor(config, lambda *stage: stages.append(stage))
    assert executor.spec.device == "cpu (1 thread, int8)"
    assert executor.spec.max_model_len == 256
    assert (executor.spec.max_num_seqs, executor.spec.max_num_batched_tokens) == (3, 32)
    assert executor.spec.num_blocks == plan.num_blocks == 3 * 256 // 16
    names = ["kernels", "weights", "sampler", "first step"]
    assert list(dict.fromkeys(what for what, _, _ in stages)) == names
    for stage in names:
        done = [done for what, done, _ in stages if what == stage]
        assert done == sorted(done)
        assert done[-1] == next(total for what, _, total in stages if what == stage) >= 1
    executor.shutdown()


def test_dtypes_and_weights_have_models_of_their_own_in_the_prefix_cache(tmp_path: Path) -> None:
    first = write_tiny_checkpoint("llama", tmp_path / "a")
    second = write_tiny_checkpoint("qwen3", tmp_path / "b")
    ids = []
    for path, dtype in ((first, "float32"), (first, "int8"), (second, "int8")):
        executor, _ = create_executor(RuntimeConfig(path, dtype=dtype, max_num_batched_tokens=32))  # type: ignore[arg-type]
        ids.append(executor.spec.model_id)
        executor.shutdown()
    assert len(set(ids)) == 3


@pytest.mark.parametrize("has_tiles", [False, True])
def test_plan_needs_no_weights_and_counts_what_is_stored(
    has_tiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "suits_tiles", lambda graph: has_tiles)
    checkpoint = open_checkpoint(write_tiny_checkpoint("llama", tmp_path))
    config = checkpoint.config
    exact = plan_cpu_memory(RuntimeConfig(tmp_path, dtype="float32"), checkpoint)
    quantized = plan_cpu_memory(RuntimeConfig(tmp_path, dtype="int8"), checkpoint)
    hidden, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    matrices = layers * (hidden * config.q_size + 3 * hidden * mlp + hidden * config.qkv_size)
    entries = 2 * config.vocab_size * hidden  # embeddings and output projection
    norms = (2 * layers + 1) * hidden
    assert exact.weight_bytes == 4 * (matrices + entries + norms)
    copies = 2 if has_vnni() and not has_tiles else 1
    assert quantized.weight_bytes < exact.weight_bytes * copies / 3
    assert quantized.weight_bytes >= copies * matrices + entries


def test_a_second_copy_of_the_weights_takes_little_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint("llama", tmp_path))
    sizes = []
    monkeypatch.setattr(factory, "suits_tiles", lambda graph: False)
    monkeypatch.setattr(factory, "available_memory", lambda: 1_000_000_000)
    for copy in (100_000_000, 100_000_001, 0):
        monkeypatch.setattr(factory, "packed_bytes", lambda graph, copy=copy: copy)
        sizes.append(plan_cpu_memory(RuntimeConfig(tmp_path, dtype="int8"), checkpoint).weight_bytes)
    assert sizes == [sizes[2] + 100_000_000, sizes[2], sizes[2]]


def test_what_does_not_fit_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("llama", tmp_path)
    stages: list[str] = []
    config = RuntimeConfig(path, kv_cache_bytes=1000)
    with pytest.raises(MemoryPlanError, match="KV cache"):
        create_executor(config, lambda stage, done, total: stages.append(stage))
    assert not stages


def test_no_model_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        create_executor(RuntimeConfig(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": "fp8"}, "--quantization fp8 is for GPUs; on a CPU, --dtype float32"),
        ({"quantization": "none"}, "--quantization none is for GPUs"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 needs a GPU"),
    ],
)
def test_a_cpu_refuses_what_only_a_gpu_does(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_tiny_checkpoint("llama", tmp_path)
    with pytest.raises(DeviceError, match=message):
        create_executor(RuntimeConfig(path, device="cpu", **arguments))


@pytest.mark.parametrize("missing", ["onnxruntime", "numba"])
def test_a_gpu_installation_without_a_gpu_says_what_to_install(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(DeviceError, match=rf"{missing}.*inflightd\[cpu\]"):
        create_executor(RuntimeConfig(write_tiny_checkpoint("llama", tmp_path), device="cpu"))
