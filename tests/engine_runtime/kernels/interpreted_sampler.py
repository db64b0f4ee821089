"""The GPU sampler on a CPU: its own launch code, with host memory for the device's and Triton's interpreter.

Only for processes in which TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine_runtime.kernels import gpu_sampling
from engine_runtime.kernels.gpu_sampling import GpuSampler
from engine_runtime.kernels.triton import embedding, sampling, sampling_report, sampling_wide
from scheduler.messages import SampledToken, TokenLogprobs
from tests.engine_runtime.kernels.interpreted_kernels import InterpretedLibrary

SPECS = [*embedding.SPECS, *sampling.SPECS, *sampling_report.SPECS, *sampling_wide.SPECS]


class HostBuffer:
    """Takes the place of DeviceBuffer and PinnedBuffer."""

    def __init__(self, num_bytes: int) -> None:
        memory = np.full(num_bytes + 256, 0xFF, np.uint8)
        start = -memory.ctypes.data % 256
        self.array = memory[start : start + num_bytes]
        self.address = self.array.ctypes.data
        self.num_bytes = num_bytes

    def fill(self, byte: int) -> None:
        self.array[:] = byte

    def free(self) -> None:
        pass


class HostEvent:
    def record(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


class HostStream:
    handle = 0

    def copy_to_device(self, destination: int, source: int, num_bytes: int) -> None:
        ctypes.memmove(destination, source, num_bytes)


class InterpretedSampler(GpuSampler):
    """A GpuSampler and the copies around it."""

    def __init__(self, vocab_size: int, max_rows: int = 16, max_slots: int = 16) -> None:
        library: Any = InterpretedLibrary(SPECS)
        super().__init__(library, vocab_size, max_rows, max_slots)
        self.stream: Any = HostStream()

    def step(
        self,
        logits: npt.NDArray[np.float32],
        slots: Sequence[int],
        positions: Sequence[int],
        **extra: Any,
    ) -> tuple[list[SampledToken], list[TokenLogprobs]]:
        """One step; ``logits`` [rows, V] must come out of it as they went in."""
        inputs = HostBuffer(self.input_bytes)
        before = logits.copy()
        packed = self.pack(inputs.array, slots, positions, **extra)
        self.enqueue(self.stream, packed.path, packed.num_rows, logits.ctypes.data, inputs.address)
        assert logits.tobytes() == before.tobytes()
        view = np.empty(self.output_bytes(packed.path), np.uint8)
        ctypes.memmove(view.ctypes.data, self.output_address, len(view))
        return self.collect(view, packed, [f"r{slot}" for slot in slots])

    def sampled_tokens(self) -> npt.NDArray[np.int32]:
        tokens = np.empty(self.max_slots, np.int32)
        ctypes.memmove(tokens.ctypes.data, self.sampled_tokens_address, tokens.nbytes)
        return tokens


def use_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, replacement in (
        ("DeviceBuffer", HostBuffer),
        ("PinnedBuffer", HostBuffer),
        ("Event", HostEvent),
    ):
        monkeypatch.setattr(gpu_sampling, name, replacement)
