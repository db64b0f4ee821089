"""What the GPU executor does about failures; the device is a stream that counts."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install -e '.[gpu]'")

from engine_runtime.cuda import CudaError
from engine_runtime.executors.tensorrt.executor import PendingStep, TensorRTExecutor
from scheduler.executor import ExecutorLostError, OutOfDeviceMemoryError
from scheduler.messages import ModelRunnerOutput, SchedulerOutput
from tests.engine_runtime.executors.cuda_errors import cuda_error

_LOST = cuda_error("CUDA_ERROR_ILLEGAL_ADDRESS", is_fatal=True)
_FULL = cuda_error("CUDA_ERROR_OUT_OF_MEMORY", is_fatal=False)


class CountingStream:
    def __init__(self, error: CudaError | None = None) -> None:
        self.num_waits = 0
        self._error = error

    def synchronize(self) -> None:
        self.num_waits += 1
        if self._error is not None:
            raise self._error


def _executor(stream: CountingStream, error: Exception) -> TensorRTExecutor:
    """One whose steps fail with ``error``."""
    executor: Any = TensorRTExecutor.__new__(TensorRTExecutor)
    executor._stream = stream

    def enqueue(step: SchedulerOutput) -> Any:
        raise error

    executor._enqueue = enqueue
    made: TensorRTExecutor = executor
    return made


_STEP = SchedulerOutput(0, (), (), ())


def test_a_failed_step_waits_for_what_it_enqueued() -> None:
    stream = CountingStream()
    future = _executor(stream, _FULL).execute(_STEP)
    with pytest.raises(OutOfDeviceMemoryError, match="OUT_OF_MEMORY"):
        future.result()
    assert stream.num_waits == 1


def test_a_device_found_lost_after_a_failed_step_is_lost() -> None:
    future = _executor(CountingStream(_LOST), ValueError("no bucket")).execute(_STEP)
    with pytest.raises(ExecutorLostError, match="ILLEGAL_ADDRESS"):
        future.result()


def test_a_lost_device_is_not_waited_for() -> None:
    stream = CountingStream()
    with pytest.raises(ExecutorLostError):
        _executor(stream, _LOST).execute(_STEP).result()
    assert stream.num_waits == 0


def test_a_result_is_read_once() -> None:
    reads: list[int] = []

    def collect() -> ModelRunnerOutput:
        reads.append(1)
        return ModelRunnerOutput(7, (), ())

    step = PendingStep(collect)
    assert step.exception() is None
    assert step.result().step_id == 7
    assert step.result() is step.result()
    assert reads == [1]
