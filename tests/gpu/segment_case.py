"""A segment with random weights, run on the device and in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx.reference import ReferenceEvaluator

from engine_runtime.cuda import DeviceBuffer, Stream
from engine_runtime.executors.tensorrt.segment import DeviceSegment
from engine_runtime.model_config import LayerConfig, ModelConfig
from engine_runtime.models.build import build_segment
from engine_runtime.models.segment import DType, Segment, SegmentKind
from engine_runtime.rope import RopeConfig

Array = npt.NDArray[Any]
_TYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def llama_8b_config(**changes: object) -> ModelConfig:
    """One layer of Llama 3.1 8B with a small vocabulary."""
    values: dict[str, object] = {
        "architecture": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 2048,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_scale": 128**-0.5,
        "layers": (LayerConfig(RopeConfig(500_000.0)),),
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


@dataclass(frozen=True)
class SegmentCase:
    """Inputs by tensor name, as the device gets them, and the outputs expected of exact arithmetic."""

    segment: Segment
    inputs: dict[str, Array]
    expected: dict[str, Array]

    def run(self, device_segment: DeviceSegment, stream: Stream) -> dict[str, Array]:
        """Runs once, with outputs and workspace filled with 0xff (NaN) before. Returns float32 arrays."""
        buffers = {name: DeviceBuffer.of(np.ascontiguousarray(array)) for name, array in self.inputs.items()}
        results = {
            name: np.empty(array.shape, _TYPES["float32" if name == "logits" else self.segment.dtype])
            for name, array in self.expected.items()
        }
        for name, array in results.items():
            buffers[name] = DeviceBuffer(array.nbytes)
            buffers[name].fill(0xFF)
        workspace = DeviceBuffer(device_segment.workspace_bytes)
        workspace.fill(0xFF)
        device_segment.use_workspace(workspace.address)
        bound = device_segment.bind({name: buffer.address for name, buffer in buffers.items()})
        bound.enqueue(stream)
        stream.synchronize()
        for name, array in results.items():
            buffers[name].read(array)
        for buffer in (*buffers.values(), workspace):
            buffer.free()
        return {name: array.astype(np.float32) for name, array in results.items()}


def make_case(
    config: ModelConfig,
    kind: SegmentKind,
    num_tokens: int,
    dtype: DType = "bfloat16",
    seed: int = 0,
    *,
    is_fp8: bool = False,
) -> SegmentCase:
    """Random inputs of size 1, weights that keep sizes, and what ONNX's reference makes of them.

    Args:
        is_fp8: projections are E4M3 with factors, and the reference gets the rounded weights.
    """
    rng = np.random.default_rng(seed)
    segment = build_segment(config, kind, dtype, num_tokens)
    exact = build_segment(config, kind, "float32", num_tokens)
    weights = _weights(config, kind, dtype, seed, is_fp8)
    names = {weight.name for weight in segment.weights}
    activations = {
        info.name: rng.standard_normal(
            tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim), dtype=np.float32
        ).astype(_TYPES[dtype])
        for info in segment.model.graph.input
        if info.name not in names
    }
    rounded = {name: array.astype(np.float32) for name, array in activations.items()}
    results = ReferenceEvaluator(exact.model).run(None, rounded | weights.exact)
    outputs = [output.name for output in exact.model.graph.output]
    expected = dict(zip(outputs, results, strict=True))
    return SegmentCase(segment, activations | weights.stored, expected)


@dataclass(frozen=True)
class _Weights:
    """As the device gets them, and the same numbers in float32."""

    stored: dict[str, Array]
    exact: dict[str, Array]


@lru_cache(maxsize=2)  # those of a large model take seconds, and serve several numbers of tokens
def _weights(config: ModelConfig, kind: SegmentKind, dtype: DType, seed: int, is_fp8: bool) -> _Weights:
    if is_fp8:
        return _quantized(_weights(config, kind, dtype, seed, False))
    rng = np.random.default_rng([seed, 1])
    segment = build_segment(config, kind, dtype, 1)
    shapes = {
        info.name: tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
        for info in segment.model.graph.input
    }
    stored: dict[str, Array] = {}
    for weight in segment.weights:
        shape = shapes[weight.name]
        values: Array = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            values *= np.float32(shape[1] ** -0.5)
        else:
            values = 1 + values / 4
        stored[weight.name] = values.astype(_TYPES[weight.dtype])
    return _Weights(stored, {name: array.astype(np.float32) for name, array in stored.items()})


def _quantized(weights: _Weights) -> _Weights:
    stored, exact = dict(weights.stored), dict(weights.exact)
    for name, values in weights.exact.items():
        if name.endswith("_proj.weight"):
            scales = np.abs(values).max(axis=1) / np.float32(448)
            stored[name] = (values / scales[:, None]).astype(ml_dtypes.float8_e4m3fn)
            stored[f"{name}_scale"] = scales.astype(np.float32)
            exact[name] = stored[name].astype(np.float32) * scales[:, None]
    return _Weights(stored, exact)


def relative_errors(case: SegmentCase, results: Mapping[str, Array]) -> dict[str, float]:
    """Norm of the difference over norm of the expected, by output; NaN if anything was left unwritten."""
    measure: Callable[[Array, Array], float] = lambda got, want: float(  # noqa: E731
        np.linalg.norm(got - want) / np.linalg.norm(want)
    )
    return {name: measure(results[name], want) for name, want in case.expected.items()}
