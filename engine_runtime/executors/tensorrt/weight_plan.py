"""Where each weight of a model will lie in device memory, and in which form: known before any is read."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from engine_runtime.executors.tensorrt.kernel_forms import Quantization
from engine_runtime.model_config import ModelConfig
from engine_runtime.models.build import build_segment
from engine_runtime.models.segment import DType, SegmentKind, WeightInput
from engine_runtime.weights.expected_tensors import EMBEDDING, LM_HEAD

NUMPY_TYPES: dict[DType, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Rows of a matrix in E4M3, and a factor for each of them.

    Attributes:
        offset: bytes from the start of the allocation.
        scale_offset: of the factors.
    """

    offset: int
    scale_offset: int
    num_rows: int
    columns: int

    @property
    def num_bytes(self) -> int:
        """With the factors."""
        return self.num_rows * (self.columns + 4)


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
        item = 1 if self.scale_offset is not None else NUMPY_TYPES[self.dtype].itemsize
        return math.prod(self.shape) * item

    @property
    def scale_bytes(self) -> int:
        """Of the factors."""
        return 0 if self.scale_offset is None else 4 * self.shape[0]

    def rows(self, first: int, num_rows: int) -> Fp8Rows:
        """Some of the rows of a quantized matrix."""
        if self.scale_offset is None:
            raise ValueError(f"{self.name} is not to be quantized")
        columns = self.shape[1]
        return Fp8Rows(self.offset + first * columns, self.scale_offset + 4 * first, num_rows, columns)


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

    def dtype_of(self, layer: int, name: str) -> DType:
        """Of a weight before it is quantized, by tensor name; ``layer`` as in ``offsets``."""
        return next(weight.dtype for weight in self._weights(layer) if weight.name == name)

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
                scale_offset = None if scale_offset is None else scale_offset + tensor.scale_bytes
            self.num_bytes = offset if scale_offset is None else scale_offset


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _layers(layer: int) -> dict[str, int]:
    return {"layer": layer, "next_layer": layer + 1}


def _rows(config: ModelConfig, name: str) -> int:
    """Rows of one projection out of several that are merged."""
    module = name.split(".")[-2]
    sizes = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    return sizes.get(module, config.intermediate_size)
