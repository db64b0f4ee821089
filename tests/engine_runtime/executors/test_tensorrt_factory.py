"""What the GPU's factory decides without a GPU: sizes, refusals, the way back to the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install -e '.[gpu]'")

from engine_runtime.cuda import CudaDevice
from engine_runtime.executors.memory_plan import MemoryPlanError
from engine_runtime.executors.tensorrt import factory
from engine_runtime.factory import create_executor
from engine_runtime.kernels.kernel_library import KernelsMissingError
from engine_runtime.runtime_config import DeviceError, RuntimeConfig
from scheduler.executor import ExecutorLostError
from scheduler.messages import ModelRunnerOutput, SchedulerOutput
from tests.engine_runtime.tiny_configs import tiny_config
from tests.reference.tiny_checkpoints import write_tiny_checkpoint


class ClosedDevice:
    """Counts how often it was closed."""

    def __init__(self) -> None:
        self.num_closed = 0
        self.properties = SimpleNamespace(
            compute_capability=(7, 5), max_shared_memory_per_block=65536, num_multiprocessors=40, name="T4"
        )

    def close(self) -> None:
        self.num_closed += 1


def _opens(monkeypatch: pytest.MonkeyPatch, open_gpu: Callable[..., Any]) -> None:
    monkeypatch.setattr(factory, "open_gpu", open_gpu)


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> ClosedDevice:
    """A GPU of a capability that no kernel is compiled for."""
    device = ClosedDevice()
    _opens(monkeypatch, lambda is_required: device)
    return device


def test_auto_goes_on_with_the_cpu_if_the_gpu_has_no_kernels(
    old_gpu: ClosedDevice, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny_checkpoint("llama", tmp_path)
    with caplog.at_level(logging.WARNING):
        executor, _ = create_executor(RuntimeConfig(path, max_num_batched_tokens=32))
    assert executor.spec.device.startswith("cpu ")
    executor.shutdown()
    assert "compute capability 7.5" in caplog.text
    assert old_gpu.num_closed == 1


def test_auto_does_not_hide_a_gpu_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(is_required: bool) -> Any:
        raise DeviceError("the GPU cannot be used (CUDA_ERROR_ECC_UNCORRECTABLE)")

    _opens(monkeypatch, fail)
    with pytest.raises(DeviceError, match="ECC"):
        create_executor(RuntimeConfig(write_tiny_checkpoint("llama", tmp_path)))


def test_a_gpu_that_was_asked_for_and_has_no_kernels_is_refused(
    old_gpu: ClosedDevice, tmp_path: Path
) -> None:
    path = write_tiny_checkpoint("llama", tmp_path)
    with pytest.raises(DeviceError, match=r"compute capability 7\.5.*--device cpu"):
        create_executor(RuntimeConfig(path, device="cuda"))
    assert old_gpu.num_closed == 1


@pytest.mark.parametrize("arguments", [{"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}])
def test_auto_does_not_take_the_cpu_for_what_only_a_gpu_does(
    old_gpu: ClosedDevice, arguments: dict[str, Any], tmp_path: Path
) -> None:
    path = write_tiny_checkpoint("llama", tmp_path)
    with pytest.raises(DeviceError, match=r"compute capability 7\.5"):
        create_executor(RuntimeConfig(path, **arguments))
    assert old_gpu.num_closed == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KernelsMissingError("no kernel"), DeviceError),
        (ExecutorLostError("lost"), DeviceError),
        (MemoryPlanError("too large"), MemoryPlanError),
    ],
)
def test_what_was_made_is_freed_in_reverse_when_loading_fails(
    error: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[str] = []
    device: Any = SimpleNamespace(close=lambda: freed.append("device"))

    def create(config: Any, device: CudaDevice, model: Any, checkpoint: Any, report: Any, undo: Any) -> Any:
        undo.callback(lambda: freed.append("stream"))
        undo.callback(lambda: freed.append("weights"))
        raise error

    monkeypatch.setattr(factory, "_create", create)
    with pytest.raises(expected):
        factory.create_gpu_executor(
            RuntimeConfig(Path()), device, tiny_config("llama"), None, lambda what, done, total: None
        )
    assert freed == ["weights", "stream", "device"]


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ({"dtype": "int8"}, {}, "--dtype int8"),
        ({"max_num_seqs": 4096}, {}, "--max-num-seqs 4096"),
        ({}, {"hidden_size": 72}, "hidden size of 72"),
        ({}, {"vocab_size": 4_000_000}, "vocabulary of 4000000"),
    ],
)
def test_what_no_kernel_takes_is_refused_first(
    arguments: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    device: Any = ClosedDevice()
    model = tiny_config("llama", **changes)
    with pytest.raises(DeviceError, match=message):
        factory.create_gpu_executor(
            RuntimeConfig(Path(), **arguments), device, model, None, lambda what, done, total: None
        )
    assert device.num_closed == 1


def test_tables_are_counted_for_each_kind_of_rotation() -> None:
    model = tiny_config("llama")
    # cos and sin, float32 [256, 16], and tables of 4 blocks of 64 tokens for 8 sequences.
    assert factory._length_bytes(model, 256, 8) == 2 * 4 * 256 * 16 + 4 * 8 * 4


@pytest.mark.parametrize(
    ("max_tokens", "max_len", "lengths"),
    [(8, 256, [2, 1, 1]), (1, 256, [1, 1, 1]), (8, 1, [1]), (8, 3, [2, 1])],
)
def test_warming_up_keeps_the_limits(max_tokens: int, max_len: int, lengths: list[int]) -> None:
    seen: list[SchedulerOutput] = []

    def execute(step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        seen.append(step)
        done: Future[ModelRunnerOutput] = Future()
        done.set_result(ModelRunnerOutput(step.step_id, (), ()))
        return done

    spec = SimpleNamespace(max_num_batched_tokens=max_tokens, max_model_len=max_len)
    executor: Any = SimpleNamespace(spec=spec, execute=execute)
    factory._warm_up(executor)
    shares = [share for step in seen for share in step.scheduled]
    assert [share.num_tokens for share in shares] == lengths
    assert [share.start for share in shares] == [sum(lengths[:i]) for i in range(len(lengths))]
    assert shares[-1].start + shares[-1].num_tokens <= max_len
    assert seen[-1].released == ("warm-up",)
