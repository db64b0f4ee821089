"""A model's weights in device memory, in the form that the segments want.

One allocation, whose size is known before anything is read. Merged projections (qkv, gate_up) are written
side by side in place, so nothing is concatenated on the host.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from engine_runtime.cuda import DeviceBuffer, Event, PinnedBuffer, Stream, checked
from engine_runtime.model_config import ModelConfig
from engine_runtime.models.build import build_segment
from engine_runtime.models.segment import DType, WeightInput
from engine_runtime.weights.checkpoint import Checkpoint
from engine_runtime.weights.expected_tensors import EMBEDDING, LM_HEAD, is_norm

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
_COPY_THREADS = 4
_READ_AHEAD = 2  # tensors; dequantized ones are large


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the checkpoint and its place on the device.

    Attributes:
        name: in the checkpoint.
        offset: bytes from the start of the allocation.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _NUMPY_TYPES[self.dtype].itemsize


class WeightPlan:
    """Where each weight of a model will lie.

    Attributes:
        dtype: of the embedding table and of all that the segments do not want otherwise.
        tensors: in order of layers.
        num_bytes: of the allocation.
    """

    def __init__(self, config: ModelConfig, dtype: DType = "bfloat16") -> None:
        self.dtype: DType = dtype
        self._num_layers = config.num_hidden_layers
        self._segments = {
            kind: build_segment(config, kind, dtype).weights for kind in ("first", "middle", "last")
        }
        self._offsets: dict[tuple[str, ...], int] = {}
        self._is_tied = config.tie_word_embeddings
        self.num_bytes = 0
        self.tensors: list[StoredTensor] = []
        table = WeightInput("embedding", (config.vocab_size, config.hidden_size), (EMBEDDING,), dtype)
        self._place(config, [table])
        for layer in range(-1, self._num_layers):
            self._place(config, self._weights(layer), **_layers(layer))

    @property
    def embedding_offset(self) -> int:
        """Of the table [vocabulary, hidden size]."""
        return self._offsets[(EMBEDDING,)]

    def offsets(self, layer: int) -> dict[str, int]:
        """Offsets of a segment's weights by tensor name.

        Args:
            layer: whose attention comes before the segment; -1 for the first one.
        """
        return {
            weight.name: self._offsets[self._sources(weight, **_layers(layer))]
            for weight in self._weights(layer)
        }

    def _weights(self, layer: int) -> tuple[WeightInput, ...]:
        is_last = layer == self._num_layers - 1
        return self._segments["first" if layer < 0 else "last" if is_last else "middle"]

    def _sources(self, weight: WeightInput, **layers: int) -> tuple[str, ...]:
        names = weight.source_names(**layers)
        return (EMBEDDING,) if self._is_tied and names == (LM_HEAD,) else names

    def _place(self, config: ModelConfig, weights: Iterable[WeightInput], **layers: int) -> None:
        for weight in weights:
            sources = self._sources(weight, **layers)
            if sources in self._offsets:
                continue
            offset = -(-self.num_bytes // _ALIGNMENT) * _ALIGNMENT
            self._offsets[sources] = offset
            for name in sources:
                rows = _rows(config, name) if len(sources) > 1 else weight.shape[0]
                tensor = StoredTensor(name, (rows, *weight.shape[1:]), weight.dtype, offset)
                self.tensors.append(tensor)
                offset += tensor.num_bytes
            self.num_bytes = offset


class WeightTarget(Protocol):
    """Takes the bytes of weights."""

    def write(self, offset: int, values: Array, dtype: np.dtype[Any]) -> None:
        """Stores flat ``values``, rounded to ``dtype``, from byte ``offset`` on.

        ``values`` may be freed once this has returned, even if the copy goes on.
        """
        ...


def load_weights(
    plan: WeightPlan, checkpoint: Checkpoint, target: WeightTarget, progress: Progress | None = None
) -> None:
    """Reads all tensors of the plan and writes them to ``target``.

    The next tensors are read, and dequantized, while one is written.

    Raises:
        CheckpointError: a tensor has a type that is not supported.
    """
    done = 0
    total = sum(tensor.num_bytes for tensor in plan.tensors)
    with ThreadPoolExecutor(_READ_AHEAD, "read-weights") as pool:
        for tensor, values in zip(plan.tensors, _read_ahead(pool, plan, checkpoint), strict=True):
            if values.shape != tensor.shape:
                raise ValueError(f"{tensor.name} has shape {values.shape}, planned was {tensor.shape}")
            target.write(tensor.offset, values.reshape(-1), _NUMPY_TYPES[tensor.dtype])
            done += tensor.num_bytes
            if progress is not None:
                progress(done, total)


def _read_ahead(pool: ThreadPoolExecutor, plan: WeightPlan, checkpoint: Checkpoint) -> Iterator[Array]:
    names = iter([tensor.name for tensor in plan.tensors])
    waiting: list[Future[Array]] = [
        pool.submit(checkpoint.read, name) for name in itertools.islice(names, _READ_AHEAD)
    ]
    while waiting:
        values = waiting.pop(0).result()
        waiting += [pool.submit(checkpoint.read, name) for name in itertools.islice(names, 1)]
        yield values


class PinnedUpload:
    """Writes to device memory through two page-locked buffers: one is filled while the other is copied."""

    def __init__(self, address: int, stream: Stream, staging_bytes: int = _STAGING_BYTES) -> None:
        """
        Args:
            address: device memory that offsets count from.

        Raises:
            CudaError: the host memory cannot be locked.
        """
        self._address = address
        self._stream = stream
        self._buffers = [PinnedBuffer(staging_bytes) for _ in range(2)]
        self._copied = [Event(), Event()]
        self._turn = 0
        self._pool = ThreadPoolExecutor(_COPY_THREADS, "copy-weights")

    def write(self, offset: int, values: Array, dtype: np.dtype[Any]) -> None:
        step = self._buffers[0].array.nbytes // dtype.itemsize
        for start in range(0, len(values), step):
            piece = values[start : start + step]
            num_bytes = len(piece) * dtype.itemsize
            buffer, copied = self._buffers[self._turn], self._copied[self._turn]
            self._turn = 1 - self._turn
            copied.synchronize()
            staged = buffer.array[:num_bytes].view(dtype)
            convert(piece, staged, self._pool)
            self._stream.copy_to_device(
                self._address + offset + start * dtype.itemsize, buffer.address, num_bytes
            )
            copied.record(self._stream)

    def close(self) -> None:
        """Waits for all copies and gives the host memory back."""
        self._stream.synchronize()
        self._pool.shutdown()
        for buffer, copied in zip(self._buffers, self._copied, strict=True):
            buffer.free()
            copied.close()


def convert(source: Array, destination: Array, pool: ThreadPoolExecutor) -> None:
    """Copies a flat array with rounding to the destination's type, in several threads."""
    if source.dtype == destination.dtype:  # plain bytes are copied fastest
        source, destination = source.view(f"u{source.itemsize}"), destination.view(f"u{source.itemsize}")
    step = max(1 << 16, -(-len(source) // _COPY_THREADS))
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

    def addresses(self, layer: int) -> Mapping[str, int]:
        """Addresses of a segment's weights by tensor name; ``layer`` as in ``WeightPlan.offsets``."""
        return {name: self._buffer.address + offset for name, offset in self._plan.offsets(layer).items()}

    def load(self, checkpoint: Checkpoint, stream: Stream, progress: Progress | None = None) -> None:
        """Fills everything from a checkpoint and waits.

        Raises:
            CheckpointError: a tensor has a type that is not supported.
            CudaError: a copy failed.
        """
        upload = PinnedUpload(self._buffer.address, stream)
        try:
            load_weights(self._plan, checkpoint, upload, progress)
        finally:
            upload.close()

    def fill_randomly(self, seed: int = 0) -> None:
        """Norms of 1, biases of 0 and matrices that keep the size of what they multiply, for benchmarks.

        Matrices repeat one block of values whose length is prime, so that rows differ.
        """
        rng = np.random.default_rng(seed)
        blocks: dict[tuple[int, DType], DeviceBuffer] = {}
        for tensor in self._plan.tensors:
            address = self._buffer.address + tensor.offset
            dtype = _NUMPY_TYPES[tensor.dtype]
            if len(tensor.shape) == 1:
                value = 1.0 if is_norm(tensor.name) else 0.0
                _write(address, np.full(tensor.shape, value, dtype))
                continue
            key = tensor.shape[1], tensor.dtype
            if key not in blocks:
                values = rng.standard_normal(16_777_213, dtype=np.float32) * tensor.shape[1] ** -0.5
                blocks[key] = DeviceBuffer.of(values.astype(dtype))
            _repeat(blocks[key], address, tensor.num_bytes)
        checked(driver.cuCtxSynchronize())
        for block in blocks.values():
            block.free()

    def free(self) -> None:
        self._buffer.free()


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
