"""A lane's buffers, stream and memory; the device is host memory and does its work as late as it may."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed: pip install -e '.[gpu]'")

from engine_runtime.executors.tensorrt import upload_lane as lanes
from engine_runtime.executors.tensorrt.upload_lane import RowQuantizer, upload_lane
from engine_runtime.executors.tensorrt.weight_loading import load_weights
from engine_runtime.executors.tensorrt.weight_plan import Quantization, WeightPlan
from tests.engine_runtime.executors.sharded_checkpoint import ShardedCheckpoint, write_sharded_checkpoint
from tests.engine_runtime.executors.test_trt_weights import rounded_to_fp8

Array = npt.NDArray[Any]


class LateDevice:
    """Copies when somebody waits for it; counts what was made and given back.

    Attributes:
        current: names of the threads that made it current.
        alive: what was made and not given back.
    """

    def __init__(self, num_bytes: int, fails_at: int = -1, fails_to_copy: bool = False) -> None:
        self.memory = np.zeros(num_bytes, np.uint8)
        self.current: set[int] = set()
        self.alive = 0
        self.fails_to_copy = fails_to_copy
        self._num_made = 0
        self._fails_at = fails_at
        self._lock = threading.Lock()
        self.launching = threading.Lock()

    def make_current(self) -> None:
        self.current.add(threading.get_ident())

    def made(self) -> None:
        assert threading.get_ident() in self.current
        with self._lock:
            self._num_made += 1
            if self._num_made == self._fails_at:
                raise MemoryError("nothing left")
            self.alive += 1

    def given_back(self) -> None:
        with self._lock:
            self.alive -= 1

    def launch(self, grid: tuple[int, int, int], stream: Any, *arguments: int) -> None:
        """The kernel ``quantize_rows``; used by one thread at a time."""
        assert self.launching.acquire(blocking=False)

        def work() -> None:
            source, values, scales, columns = arguments
            numbers = _at(source, 2 * grid[0] * columns).view(ml_dtypes.bfloat16)
            rounded = rounded_to_fp8(numbers.reshape(grid[0], columns))
            _at(values, grid[0] * columns)[:] = rounded.values.view(np.uint8).reshape(-1)
            _at(scales, 4 * grid[0])[:] = rounded.scales.view(np.uint8)

        stream.enqueue(work)
        self.launching.release()


def _at(address: int, num_bytes: int) -> Array:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (num_bytes,))


def use(device: LateDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of CUDA."""

    class Made:
        def __init__(self) -> None:
            device.made()

        def close(self) -> None:
            device.given_back()

    class Buffer(Made):
        def __init__(self, num_bytes: int) -> None:
            super().__init__()
            self.array = np.zeros(num_bytes, np.uint8)
            self.address = self.array.ctypes.data

        def free(self) -> None:
            device.given_back()

    class Stream(Made):
        def __init__(self) -> None:
            super().__init__()
            self.waiting: list[Callable[[], None]] = []

        def enqueue(self, work: Callable[[], None]) -> None:
            self.waiting.append(work)

        def copy_to_device(self, destination: int, source: int, num_bytes: int) -> None:
            if device.fails_to_copy:
                raise OSError("the device is lost")
            self.enqueue(lambda: ctypes.memmove(destination, source, num_bytes))

        def do(self, count: int) -> None:
            for work in self.waiting[:count]:
                work()
            del self.waiting[:count]

        def synchronize(self) -> None:
            self.do(len(self.waiting))

    class Event(Made):
        reached: Callable[[], None] | None = None

        def record(self, stream: Stream) -> None:
            last = stream.waiting[-1]
            self.reached = lambda: stream.do(stream.waiting.index(last) + 1 if last in stream.waiting else 0)

        def synchronize(self) -> None:
            if self.reached is not None:
                self.reached()

    for name, replacement in (
        ("PinnedBuffer", Buffer),
        ("DeviceBuffer", Buffer),
        ("Stream", Stream),
        ("Event", Event),
    ):
        monkeypatch.setattr(lanes, name, replacement)


def load(stored: ShardedCheckpoint, plan: WeightPlan, device: LateDevice, num_threads: int) -> None:
    checkpoint = stored.open()
    address = device.memory.ctypes.data
    kernel: Any = SimpleNamespace(launch=device.launch)
    quantizer = None if plan.quantization == "none" else RowQuantizer(kernel, address)
    that: Any = device
    try:
        load_weights(
            plan,
            checkpoint,
            lambda size: upload_lane(that, address, size, quantizer),
            num_threads=num_threads,
            piece_bytes=1024,
        )
    finally:
        checkpoint.close()


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("num_threads", [1, 4])
def test_no_buffer_is_filled_before_it_was_copied(
    num_threads: int, quantization: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = write_sharded_checkpoint(tmp_path / "model", "qwen2", types=("bfloat16", "float32"))
    plan = WeightPlan(stored.open().config, quantization=quantization)
    device = LateDevice(plan.num_bytes)
    use(device, monkeypatch)
    load(stored, plan, device, num_threads)
    for offset, data in stored.expected(plan).items():
        np.testing.assert_array_equal(device.memory[offset : offset + len(data)], data)
    assert device.alive == 0


@pytest.mark.parametrize("fails_at", range(1, 13))
def test_everything_is_given_back_when_something_cannot_be_made(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane is a stream, two buffers with an event each, and one buffer on the device."""
    stored = write_sharded_checkpoint(tmp_path / "model", "llama")
    plan = WeightPlan(stored.open().config, quantization="fp8")
    device = LateDevice(plan.num_bytes, fails_at=fails_at)
    use(device, monkeypatch)
    with pytest.raises(MemoryError):
        load(stored, plan, device, num_threads=2)
    assert device.alive == 0


def test_everything_is_given_back_when_a_copy_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = write_sharded_checkpoint(tmp_path / "model", "llama")
    plan = WeightPlan(stored.open().config)
    device = LateDevice(plan.num_bytes, fails_to_copy=True)
    use(device, monkeypatch)
    with pytest.raises(OSError, match="the device is lost"):
        load(stored, plan, device, num_threads=3)
    assert device.alive == 0
