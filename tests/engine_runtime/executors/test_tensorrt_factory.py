"""What the GPU's factory decides without a GPU: sizes, refusals, the way back to the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install -e '.[gpu]'")

from engine_runtime.cuda import CudaDevice
from engine_runtime.executors.memory_plan import MemoryPlanError
from engine_runtime.executors.tensorrt import factory
from engine_runtime.executors.tensorrt.kernel_segment import UnsupportedSegmentError
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


class FakeSegments:
    """Makes what a set of (quantization, kind) says, else refuses."""

    supported: ClassVar[set[tuple[str, str]]] = set()

    def __init__(
        self, model: Any, device: Any, cache: Any, library: Any, *, quantization: str = "none"
    ) -> None:
        self.quantization = quantization

    def workspace_bytes(self, kind: str, buckets: Sequence[int]) -> int:
        if (self.quantization, kind) not in self.supported:
            raise UnsupportedSegmentError(f"no kernel computes qkv for {buckets[-1]} tokens")
        return buckets[-1]


_ALL = {(form, kind) for form in ("none", "fp8") for kind in ("first", "middle", "last")}


@pytest.mark.parametrize(
    ("asked", "holds_fp8", "supported", "expected"),
    [
        ("auto", False, _ALL, "none"),
        ("auto", True, _ALL, "fp8"),
        ("auto", True, _ALL - {("fp8", "last")}, "none"),
        ("none", True, _ALL, "none"),
        ("fp8", False, _ALL, "fp8"),
    ],
)
def test_weights_are_quantized_if_asked_for_or_if_the_checkpoint_is(
    asked: str,
    holds_fp8: bool,
    supported: set[tuple[str, str]],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factory, "SegmentFactory", FakeSegments)
    monkeypatch.setattr(FakeSegments, "supported", supported)
    config: Any = SimpleNamespace(quantization=asked)
    nothing: Any = None
    checkpoint: Any = SimpleNamespace(holds_fp8=holds_fp8)
    model = tiny_config("llama")
    made, workspace = factory._make_segments(config, nothing, model, checkpoint, nothing, 64, 8)
    assert made.quantization == expected
    assert workspace == 64


def test_fp8_that_no_kernel_computes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "SegmentFactory", FakeSegments)
    nothing: Any = None
    with pytest.raises(DeviceError, match="--quantization none does without"):
        factory._make_segments(
            RuntimeConfig(Path(), quantization="fp8"), nothing, tiny_config("llama"), None, nothing, 64, 8
        )


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


@pytest.mark.parametrize(("num_layers", "kinds"), [(1, ["first", "last"]), (2, ["first", "last", "middle"])])
def test_the_workspace_is_that_of_the_segments_and_buckets_that_there_are(
    num_layers: int, kinds: list[str]
) -> None:
    asked: dict[str, list[int]] = {}

    def workspace_bytes(kind: str, buckets: Any) -> int:
        asked[kind] = list(buckets)
        return {"first": 700, "middle": 900, "last": 800}[kind]

    segments: Any = SimpleNamespace(workspace_bytes=workspace_bytes)
    assert factory._workspace_bytes(segments, num_layers, 64, 8) == (800 if num_layers == 1 else 900)
    assert sorted(asked) == kinds
    assert asked["last"] == [1, 2, 4, 8]
    assert asked["first"] == [1, 2, 4, 8, 16, 32, 64]


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
