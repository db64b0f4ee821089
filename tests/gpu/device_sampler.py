"""A GpuSampler with the copies around it, as an executor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine_runtime.cuda import DeviceBuffer, PinnedBuffer, Stream, checked, driver
from engine_runtime.kernels.gpu_sampling import GpuSampler
from engine_runtime.kernels.kernel_library import KernelLibrary
from engine_runtime.kernels.sampling_rows import PackedRows, SamplingPath
from scheduler.messages import SampledToken, TokenLogprobs


class DeviceSampler(GpuSampler):
    """Samples rows of logits that lie in host memory.

    Attributes:
        logits: float32 [max_rows, vocab_size] on the device.
        inputs: the packed rows there.
    """

    def __init__(self, library: KernelLibrary, vocab_size: int, max_rows: int, max_slots: int) -> None:
        super().__init__(library, vocab_size, max_rows, max_slots)
        self.stream = Stream()
        self.logits = DeviceBuffer(4 * self.max_rows * vocab_size)
        self.inputs = DeviceBuffer(self.input_bytes)
        self._pinned_inputs = PinnedBuffer(self.input_bytes)
        self._outputs = PinnedBuffer(self.output_bytes(SamplingPath.FULL))

    def upload(self, slots: Sequence[int], positions: Sequence[int], **extra: Any) -> PackedRows:
        packed = self.pack(self._pinned_inputs.array, slots, positions, **extra)
        self.stream.copy_to_device(self.inputs.address, self._pinned_inputs.address, self.input_bytes)
        return packed

    def results(
        self, packed: PackedRows, request_ids: Sequence[str]
    ) -> tuple[list[SampledToken], list[TokenLogprobs]]:
        num_bytes = self.output_bytes(packed.path)
        self.stream.copy_to_host(self._outputs.address, self.output_address, num_bytes)
        self.stream.synchronize()
        return self.collect(self._outputs.array[:num_bytes], packed, request_ids)

    def step(
        self, logits: npt.NDArray[np.float32], slots: Sequence[int], positions: Sequence[int], **extra: Any
    ) -> tuple[list[SampledToken], list[TokenLogprobs]]:
        """One step; checks that the logits [rows, V] come out of it as they went in."""
        self.stream.synchronize()
        self.logits.write(np.ascontiguousarray(logits))
        packed = self.upload(slots, positions, **extra)
        self.enqueue(self.stream, packed.path, packed.num_rows, self.logits.address, self.inputs.address)
        result = self.results(packed, [f"r{slot}" for slot in slots])
        if packed.path is SamplingPath.FULL:
            after = np.empty_like(logits)
            self.logits.read(after)
            assert after.tobytes() == logits.tobytes()
        return result

    def sampled_tokens(self) -> npt.NDArray[np.int32]:
        tokens = np.empty(self.max_slots, np.int32)
        self.stream.synchronize()
        checked(driver.cuMemcpyDtoH(tokens.ctypes.data, self.sampled_tokens_address, tokens.nbytes))
        return tokens

    def close(self) -> None:
        self.stream.synchronize()
        super().close()
        self.logits.free()
        self.inputs.free()
        self._pinned_inputs.free()
        self._outputs.free()
        self.stream.close()
