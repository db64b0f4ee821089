"""A model's weights in device memory, in the form that the segments want.

One allocation, whose size is known before anything is read. Merged projections (qkv, gate_up) are written
side by side in place, so nothing is concatenated on the host. With fp8, projections are rounded on the
device, or copied if the checkpoint holds them so: each row of W is E4M3 times a float32 factor.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from engine_runtime.cuda import DeviceBuffer, Event, PinnedBuffer, Stream, checked
from engine_runtime.executors.tensorrt.kernel_forms import Quantization
from engine_runtime.executors.tensorrt.weight_plan import NUMPY_TYPES, StoredTensor, WeightPlan
from engine_runtime.kernels.kernel_library import Kernel, KernelLibrary, KernelsMissingError
from engine_runtime.models.segment import DType
from engine_runtime.weights.checkpoint import Checkpoint
from engine_runtime.weights.expected_tensors import is_norm
from engine_runtime.weights.fp8_tensor import Fp8Tensor
from engine_runtime.weights.mapped_pages import populate, release

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]
"""Called with (bytes that are done, bytes in all), as they lie on the device."""

_STAGING_BYTES = 32 << 20
_THREADS = min(8, os.cpu_count() or 1)
_READ_AHEAD = _THREADS  # tensors; they are computed meanwhile if the file holds them quantized


class WeightTarget(Protocol):
    """Takes the values of weights."""

    def write(self, tensor: StoredTensor, values: Array) -> None:
        """Stores ``values`` [rows, columns] or [size] in the form and at the place that ``tensor`` says.

        ``values`` may be freed once this has returned, even if copying goes on.
        """
        ...

    def write_fp8(self, tensor: StoredTensor, stored: Fp8Tensor) -> None:
        """Stores a matrix and its factors as they are, for a ``tensor`` with a ``scale_offset``."""
        ...


def load_weights(
    plan: WeightPlan, checkpoint: Checkpoint, target: WeightTarget, progress: Progress | None = None
) -> None:
    """Reads all tensors of the plan and writes them to ``target``.

    The next tensors are read, or dequantized, while one is written. What was written leaves the process's
    memory.

    Raises:
        CheckpointError: a tensor has a type that is not supported.
    """
    done = 0
    total = sum(tensor.num_bytes for tensor in plan.tensors)
    with ThreadPoolExecutor(_READ_AHEAD, "read-weights") as pool:
        for tensor, read in zip(plan.tensors, _read_ahead(pool, plan, checkpoint), strict=True):
            values = read.values if isinstance(read, Fp8Tensor) else read
            if values.shape != tensor.shape:
                raise ValueError(f"{tensor.name} has shape {values.shape}, planned was {tensor.shape}")
            if isinstance(read, Fp8Tensor):
                target.write_fp8(tensor, read)
            else:
                target.write(tensor, read)
            release(values)
            done += tensor.num_bytes
            if progress is not None:
                progress(done, total)


def _read(checkpoint: Checkpoint, tensor: StoredTensor) -> Array | Fp8Tensor:
    if tensor.scale_offset is not None and checkpoint.is_fp8(tensor.name):
        stored = checkpoint.read_fp8(tensor.name)
        populate(stored.values)
        return stored
    values = checkpoint.read(tensor.name)
    populate(values)
    return values


def _read_ahead(
    pool: ThreadPoolExecutor, plan: WeightPlan, checkpoint: Checkpoint
) -> Iterator[Array | Fp8Tensor]:
    tensors = iter(plan.tensors)
    waiting: list[Future[Array | Fp8Tensor]] = [
        pool.submit(_read, checkpoint, tensor) for tensor in itertools.islice(tensors, _READ_AHEAD)
    ]
    while waiting:
        values = waiting.pop(0).result()
        waiting += [pool.submit(_read, checkpoint, tensor) for tensor in itertools.islice(tensors, 1)]
        yield values


class PinnedUpload:
    """Writes to device memory through two page-locked buffers: one is filled while the other is copied.

    What is to be quantized goes to one of two device buffers of the same size, and from there by a kernel.
    """

    def __init__(
        self,
        address: int,
        stream: Stream,
        quantize: Kernel | None = None,
        staging_bytes: int = _STAGING_BYTES,
    ) -> None:
        """
        Args:
            address: device memory that offsets count from.
            quantize: the kernel ``quantize_rows``; needed for tensors that are quantized.
            staging_bytes: of each buffer; at least a row of any tensor.

        Raises:
            CudaError: the host memory cannot be locked, or there is no device memory left.
        """
        self._address = address
        self._stream = stream
        self._quantize = quantize
        self._buffers = [PinnedBuffer(staging_bytes) for _ in range(2)]
        self._unquantized = [DeviceBuffer(staging_bytes) for _ in range(2)] if quantize is not None else []
        self._copied = [Event(), Event()]
        self._turn = 0
        self._pool = ThreadPoolExecutor(_THREADS, "copy-weights")

    def write(self, tensor: StoredTensor, values: Array) -> None:
        dtype = NUMPY_TYPES[tensor.dtype]
        if tensor.scale_offset is None:
            self._copy(values.reshape(-1), dtype, self._address + tensor.offset)
            return
        columns = tensor.shape[1]
        step = self._buffers[0].array.nbytes // (columns * dtype.itemsize)
        for start in range(0, len(values), step):
            piece = values[start : start + step]
            source = self._unquantized[self._turn].address
            with self._next_buffer() as buffer:
                self._put(piece.reshape(-1), dtype, buffer, source)
                _quantize(self._quantize, source, self._address, tensor, start, len(piece), self._stream)

    def write_fp8(self, tensor: StoredTensor, stored: Fp8Tensor) -> None:
        if tensor.scale_offset is None:
            raise ValueError(f"{tensor.name} is not to be quantized")
        self._copy(stored.values.reshape(-1), stored.values.dtype, self._address + tensor.offset)
        self._copy(stored.scales, stored.scales.dtype, self._address + tensor.scale_offset)

    def _copy(self, values: Array, dtype: np.dtype[Any], destination: int) -> None:
        """A flat array of any size, rounded to ``dtype``."""
        step = self._buffers[0].array.nbytes // dtype.itemsize
        for start in range(0, len(values), step):
            with self._next_buffer() as buffer:
                piece = values[start : start + step]
                self._put(piece, dtype, buffer, destination + start * dtype.itemsize)

    def _put(self, piece: Array, dtype: np.dtype[Any], buffer: PinnedBuffer, destination: int) -> None:
        num_bytes = len(piece) * dtype.itemsize
        convert(piece, buffer.array[:num_bytes].view(dtype), self._pool)
        self._stream.copy_to_device(destination, buffer.address, num_bytes)

    @contextlib.contextmanager
    def _next_buffer(self) -> Iterator[PinnedBuffer]:
        """The buffer that has waited longer; what is enqueued inside has done with it when its turn comes."""
        turn = self._turn
        self._copied[turn].synchronize()
        yield self._buffers[turn]
        self._copied[turn].record(self._stream)
        self._turn = 1 - turn

    def close(self) -> None:
        """Waits for all copies and gives the memory back."""
        self._stream.synchronize()
        self._pool.shutdown()
        for pinned in self._buffers:
            pinned.free()
        for unquantized in self._unquantized:
            unquantized.free()
        for copied in self._copied:
            copied.close()


def _quantize(
    kernel: Kernel | None,
    source: int,
    address: int,
    tensor: StoredTensor,
    first_row: int,
    num_rows: int,
    stream: Stream,
) -> None:
    """Enqueues rounding of ``num_rows`` rows of 16-bit numbers at ``source``."""
    if kernel is None or tensor.scale_offset is None:
        raise ValueError(f"{tensor.name} is to be quantized, and there is no kernel for it")
    columns = tensor.shape[1]
    destination = address + tensor.offset + first_row * columns
    scales = address + tensor.scale_offset + 4 * first_row
    kernel.launch((num_rows, 1, 1), stream, source, destination, scales, columns)


def convert(source: Array, destination: Array, pool: ThreadPoolExecutor) -> None:
    """Copies a flat array with rounding to the destination's type, in several threads."""
    if source.dtype == destination.dtype:  # plain bytes are copied fastest
        source, destination = source.view(f"u{source.itemsize}"), destination.view(f"u{source.itemsize}")
    step = max(1 << 16, -(-len(source) // _THREADS))
    parts = range(0, len(source), step)
    jobs = [
        pool.submit(np.copyto, destination[i : i + step], source[i : i + step], casting="unsafe")
        for i in parts
    ]
    for job in jobs:
        job.result()


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
        stream: Stream,
        progress: Progress | None = None,
        library: KernelLibrary | None = None,
    ) -> None:
        """Fills everything from a checkpoint and waits.

        Args:
            library: needed if the plan quantizes.

        Raises:
            CheckpointError: a tensor has a type that is not supported.
            CudaError: a copy failed.
            KernelsMissingError: the GPU cannot quantize.
        """
        upload = PinnedUpload(self._buffer.address, stream, self._kernel(library))
        try:
            load_weights(self._plan, checkpoint, upload, progress)
        finally:
            upload.close()

    def fill_randomly(self, seed: int = 0, library: KernelLibrary | None = None) -> None:
        """Norms of 1, biases of 0 and matrices that keep the size of what they multiply, for benchmarks.

        Matrices repeat one block of values whose length is prime, so that rows differ.
        """
        rng = np.random.default_rng(seed)
        kernel = self._kernel(library)
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
            if tensor.scale_offset is None:
                _repeat(blocks[key], address, tensor.num_bytes)
                continue
            step = blocks[key].num_bytes // (2 * columns)
            for row in range(0, tensor.shape[0], step):
                num_rows = min(step, tensor.shape[0] - row)
                _quantize(kernel, blocks[key].address, self._buffer.address, tensor, row, num_rows, stream)
        checked(driver.cuCtxSynchronize())
        stream.close()
        for block in blocks.values():
            block.free()

    def _kernel(self, library: KernelLibrary | None) -> Kernel | None:
        if self._plan.quantization == "none":
            return None
        if library is None:
            raise KernelsMissingError("there are no kernels for this GPU, and fp8 needs them")
        return library.get("quantize_rows")

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
