"""A model's weights in device memory, in the form that the segments want.

One allocation, whose size is known before anything is read. Merged projections (qkv, gate_up) are written
side by side in place, so nothing is concatenated on the host. With fp8, projections are rounded on the
device, or copied if the checkpoint holds them so: each row of W is E4M3 times a float32 factor.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from engine_runtime.cuda import DeviceBuffer, Event, PinnedBuffer, Stream, checked
from engine_runtime.executors.tensorrt.kernel_forms import Quantization
from engine_runtime.kernels.kernel_library import Kernel, KernelLibrary, KernelsMissingError
from engine_runtime.model_config import ModelConfig
from engine_runtime.models.build import build_segment
from engine_runtime.models.segment import DType, SegmentKind, WeightInput
from engine_runtime.weights.checkpoint import Checkpoint
from engine_runtime.weights.expected_tensors import EMBEDDING, LM_HEAD, is_norm
from engine_runtime.weights.fp8_tensor import Fp8Tensor
from engine_runtime.weights.mapped_pages import populate, release

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]
"""Called with (bytes that are done, bytes in all), as they lie on the device."""

_NUMPY_TYPES: dict[DType, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_ALIGNMENT = 256
_STAGING_BYTES = 32 << 20
_THREADS = min(8, os.cpu_count() or 1)
_READ_AHEAD = _THREADS  # tensors; they are computed meanwhile if the file holds them quantized


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the checkpoint and its place on the device.

    Attributes:
        name: in the checkpoint.
        dtype: of the values before they are quantized, if they are.
        offset: bytes from the start of the allocation.
        scale_offset: of the rows' factors; None if the tensor is not quantized.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    offset: int
    scale_offset: int | None = None

    @property
    def num_bytes(self) -> int:
        """Without the factors."""
        item = 1 if self.scale_offset is not None else _NUMPY_TYPES[self.dtype].itemsize
        return math.prod(self.shape) * item


class WeightPlan:
    """Where each weight of a model will lie.

    Attributes:
        dtype: of the embedding table and of all that the segments do not want otherwise.
        quantization: of the projections, except in segments that are kept.
        tensors: in order of layers.
        num_bytes: of the allocation.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: DType = "bfloat16",
        quantization: Quantization = "none",
        kept: Collection[int] = (),
    ) -> None:
        """
        Args:
            kept: segments whose projections are not quantized, by the layer as in ``offsets``.
        """
        self.dtype: DType = dtype
        self._kept = kept
        self.quantization: Quantization = quantization
        self._num_layers = config.num_hidden_layers
        kinds: tuple[SegmentKind, ...] = ("first", "middle", "last")
        self._segments = {kind: build_segment(config, kind, dtype).weights for kind in kinds}
        self._offsets: dict[tuple[str, ...], int] = {}
        self._scale_offsets: dict[tuple[str, ...], int] = {}
        self._is_tied = config.tie_word_embeddings
        self.num_bytes = 0
        self.tensors: list[StoredTensor] = []
        table = WeightInput("embedding", (config.vocab_size, config.hidden_size), (EMBEDDING,), dtype)
        self._place(config, [table], "none")
        for layer in range(-1, self._num_layers):
            weights = self._weights(layer)
            self._place(config, weights, self.quantization_of(layer), **_layers(layer))

    def quantization_of(self, layer: int) -> Quantization:
        """Of the projections of a segment; ``layer`` as in ``offsets``."""
        return "none" if layer in self._kept else self.quantization

    def kinds_of(self, quantization: Quantization) -> tuple[SegmentKind, ...]:
        """The kinds of segments that have such weights."""
        layers = range(-1, self._num_layers)
        found = [self._kind(layer) for layer in layers if self.quantization_of(layer) == quantization]
        return tuple(dict.fromkeys(found))

    @property
    def embedding_offset(self) -> int:
        """Of the table [vocabulary, hidden size]."""
        return self._offsets[(EMBEDDING,)]

    def offsets(self, layer: int) -> dict[str, int]:
        """Offsets of a segment's weights by tensor name, and of the factors of quantized ones as NAME_scale.

        Args:
            layer: whose attention comes before the segment; -1 for the first one.
        """
        found = {}
        for weight in self._weights(layer):
            sources = self._sources(weight, **_layers(layer))
            found[weight.name] = self._offsets[sources]
            if sources in self._scale_offsets:
                found[f"{weight.name}_scale"] = self._scale_offsets[sources]
        return found

    def _kind(self, layer: int) -> SegmentKind:
        is_last = layer == self._num_layers - 1
        return "first" if layer < 0 else "last" if is_last else "middle"

    def _weights(self, layer: int) -> tuple[WeightInput, ...]:
        return self._segments[self._kind(layer)]

    def _sources(self, weight: WeightInput, **layers: int) -> tuple[str, ...]:
        names = weight.source_names(**layers)
        return (EMBEDDING,) if self._is_tied and names == (LM_HEAD,) else names

    def _place(
        self,
        config: ModelConfig,
        weights: Iterable[WeightInput],
        quantization: Quantization,
        **layers: int,
    ) -> None:
        for weight in weights:
            sources = self._sources(weight, **layers)
            if sources in self._offsets:
                continue
            is_quantized = quantization == "fp8" and weight.name.endswith("_proj.weight")
            offset = self._offsets[sources] = _aligned(self.num_bytes)
            scale_offset = None
            if is_quantized:
                scale_offset = self._scale_offsets[sources] = _aligned(offset + math.prod(weight.shape))
            for name in sources:
                rows = _rows(config, name) if len(sources) > 1 else weight.shape[0]
                shape = (rows, *weight.shape[1:])
                tensor = StoredTensor(name, shape, weight.dtype, offset, scale_offset)
                self.tensors.append(tensor)
                offset += tensor.num_bytes
                scale_offset = None if scale_offset is None else scale_offset + 4 * rows
            self.num_bytes = offset if scale_offset is None else scale_offset


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
        dtype = _NUMPY_TYPES[tensor.dtype]
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
            dtype = _NUMPY_TYPES[tensor.dtype]
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


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _write(address: int, array: Array) -> None:
    checked(driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes))


def _repeat(block: DeviceBuffer, address: int, num_bytes: int) -> None:
    for start in range(0, num_bytes, block.num_bytes):
        size = min(block.num_bytes, num_bytes - start)
        checked(driver.cuMemcpyDtoD(address + start, block.address, size))


def _layers(layer: int) -> dict[str, int]:
    return {"layer": layer, "next_layer": layer + 1}


def _rows(config: ModelConfig, name: str) -> int:
    """Rows of one projection out of several that are merged."""
    module = name.split(".")[-2]
    sizes = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    return sizes.get(module, config.intermediate_size)
