"""The GPU sampler on a CPU: its own launch code, with host memory for the device's and Triton's interpreter.

Only for processes in which TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import triton.language as tl
import triton.runtime.interpreter as interpreter

from engine_runtime.kernels import gpu_sampling
from engine_runtime.kernels.gpu_sampling import GpuSampler
from engine_runtime.kernels.triton import embedding, sampling, sampling_report, sampling_wide
from engine_runtime.kernels.triton.sampling_row import PATHS
from scheduler.messages import SampledToken, TokenLogprobs

_POINTEES = {
    "numbers": tl.float64,
    "addresses": tl.int64,
    **dict.fromkeys(
        (
            "words", "subtiles", "few_ids", "tokens", "is_valid", "is_valid_out", "is_wide", "sampled_tokens",
            "ranks", "top_ids", "token_ids",
        ),
        tl.int32,
    ),
    **dict.fromkeys(
        (
            "logits", "maxima", "sums", "raw_maxima", "raw_sums", "few_weights", "chosen_logits",
            "largest_logits", "totals", "top_logits",
        ),
        tl.float32,
    ),
    **dict.fromkeys(("table", "hidden"), tl.float16),
}  # fmt: skip

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    """numpy 2.4 converts arrays of rank 0 only to integers; the interpreter's scalars have rank 1."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor_and_index


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


class _InterpretedKernel:
    def __init__(self, function: Any, **constants: int) -> None:
        self._function = function
        self._constants = constants

    def launch(self, grid: tuple[int, ...], stream: int, *args: int | float) -> None:
        names = [name for name in self._function.arg_names if name not in self._constants]
        converted = [self._convert(name, arg) for name, arg in zip(names, args, strict=True)]
        with np.errstate(all="ignore"):  # what is not finite is part of the tests
            self._function[grid](*converted, **self._constants)

    @staticmethod
    def _convert(name: str, arg: int | float) -> Any:
        if name not in _POINTEES:
            return arg
        pointer = tl.pointer_type(_POINTEES[name])
        return tl.tensor(interpreter.TensorHandle(np.array([arg], np.uint64), pointer), pointer)


class InterpretedKernels:
    """The compiled kernels' place, by their names."""

    def get(self, name: str) -> _InterpretedKernel:
        if name.startswith("embed"):
            return _InterpretedKernel(embedding.embed, BLOCK=64)
        _, kind, *rest = name.split("_")
        if kind == "report":
            return _InterpretedKernel(sampling_report.report)
        constants = PATHS[rest[0]]
        if kind == "scan":
            return _InterpretedKernel(sampling.scan, **constants)
        if kind == "draw":
            return _InterpretedKernel(sampling.draw, **constants)
        return _InterpretedKernel(sampling_wide.draw_wide, ADJUSTS=constants["ADJUSTS"])


class InterpretedSampler(GpuSampler):
    """A GpuSampler and the copies around it."""

    def __init__(self, vocab_size: int, max_rows: int = 16, max_slots: int = 16) -> None:
        super().__init__(cast(Any, InterpretedKernels()), vocab_size, max_rows, max_slots)
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
