"""A model's weights in device memory, in the form that the segments want.

One allocation, whose size is known before anything is read. Merged projections (qkv, gate_up) are written
side by side in place, so nothing is concatenated on the host. With fp8, projections are rounded on the
device, or copied if the checkpoint holds them so: each row of W is E4M3 times a float32 factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from engine_runtime.cuda import CudaDevice, DeviceBuffer, Stream, checked
from engine_runtime.executors.tensorrt.kernel_forms import Quantization
from engine_runtime.executors.tensorrt.upload_lane import RowQuantizer, upload_lane
from engine_runtime.executors.tensorrt.weight_loading import Progress, load_weights
from engine_runtime.executors.tensorrt.weight_plan import NUMPY_TYPES, WeightPlan
from engine_runtime.kernels.kernel_library import KernelLibrary, KernelsMissingError
from engine_runtime.models.segment import DType
from engine_runtime.weights.checkpoint import Checkpoint
from engine_runtime.weights.expected_tensors import is_norm

Array = npt.NDArray[Any]


class DeviceWeights:
    """The weights of a model on the device, uninitialized at first.

    Attributes:
        num_bytes: of device memory.
    """

    def __init__(self, plan: WeightPlan) -> None:
        """
        Raises:
            CudaError: not enough memory.
        """
        self._plan = plan
        self._buffer = DeviceBuffer(plan.num_bytes)
        self.num_bytes = plan.num_bytes

    @property
    def embedding(self) -> int:
        """Address of the embedding table [vocabulary, hidden size]."""
        return self._buffer.address + self._plan.embedding_offset

    def quantization_of(self, layer: int) -> Quantization:
        """As ``WeightPlan.quantization_of``."""
        return self._plan.quantization_of(layer)

    def dtype_of(self, layer: int, name: str) -> DType:
        """As ``WeightPlan.dtype_of``."""
        return self._plan.dtype_of(layer, name)

    def addresses(self, layer: int) -> Mapping[str, int]:
        """Addresses of a segment's weights by tensor name; ``layer`` as in ``WeightPlan.offsets``."""
        return {name: self._buffer.address + offset for name, offset in self._plan.offsets(layer).items()}

    def load(
        self,
        checkpoint: Checkpoint,
        device: CudaDevice,
        progress: Progress | None = None,
        library: KernelLibrary | None = None,
    ) -> None:
        """Fills everything from a checkpoint and waits.

        Args:
            library: needed if the plan quantizes.

        Raises:
            CheckpointError: a tensor has a type that is not supported, or a file cannot be read or has
                become shorter.
            CudaError: a copy failed.
            KernelsMissingError: the GPU cannot quantize.
        """
        address, quantizer = self._buffer.address, self._quantizer(library)
        load_weights(
            self._plan, checkpoint, lambda size: upload_lane(device, address, size, quantizer), progress
        )

    def fill_randomly(self, seed: int = 0, library: KernelLibrary | None = None) -> None:
        """Norms of 1, biases of 0 and matrices that keep the size of what they multiply, for benchmarks.

        Matrices repeat one block of values whose length is prime, so that rows differ.
        """
        rng = np.random.default_rng(seed)
        quantizer = self._quantizer(library)
        stream = Stream()
        blocks: dict[tuple[int, DType], DeviceBuffer] = {}
        for tensor in self._plan.tensors:
            address = self._buffer.address + tensor.offset
            dtype = NUMPY_TYPES[tensor.dtype]
            if len(tensor.shape) == 1:
                value = 1.0 if is_norm(tensor.name) else 0.0
                _write(address, np.full(tensor.shape, value, dtype))
                continue
            columns = tensor.shape[1]
            key = columns, tensor.dtype
            if key not in blocks:
                values = rng.standard_normal(16_777_213, dtype=np.float32) * columns**-0.5
                blocks[key] = DeviceBuffer.of(values.astype(dtype))
            if quantizer is None or tensor.scale_offset is None:
                _repeat(blocks[key], address, tensor.num_bytes)
                continue
            step = blocks[key].num_bytes // (2 * columns)
            for row in range(0, tensor.shape[0], step):
                rows = tensor.rows(row, min(step, tensor.shape[0] - row))
                quantizer.enqueue(stream, blocks[key].address, rows)
        checked(driver.cuCtxSynchronize())
        stream.close()
        for block in blocks.values():
            block.free()

    def _quantizer(self, library: KernelLibrary | None) -> RowQuantizer | None:
        if self._plan.quantization == "none":
            return None
        if library is None:
            raise KernelsMissingError("there are no kernels for this GPU, and fp8 needs them")
        return RowQuantizer(library.get("quantize_rows"), self._buffer.address)

    def read(self, array: Array) -> None:
        """Fills an array of ``num_bytes`` bytes with everything; for tests."""
        self._buffer.read(array)

    def free(self) -> None:
        self._buffer.free()


def _write(address: int, array: Array) -> None:
    checked(driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes))


def _repeat(block: DeviceBuffer, address: int, num_bytes: int) -> None:
    for start in range(0, num_bytes, block.num_bytes):
        size = min(block.num_bytes, num_bytes - start)
        checked(driver.cuMemcpyDtoD(address + start, block.address, size))
