"""TensorRT for RTX compiles every segment of every architecture. Its builder needs no GPU."""

from __future__ import annotations

import functools
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from engine_runtime.models.architectures import ARCHITECTURES
from engine_runtime.models.build import build_segment
from engine_runtime.models.segment import DType, Segment, SegmentKind
from tests.engine_runtime.tiny_configs import tiny_config

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install -e '.[gpu]'")

BUCKETS = (1, 64, 512)
_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_segment_compiles(architecture: str, dtype: DType) -> None:
    config = tiny_config(architecture)
    kinds: tuple[SegmentKind, ...] = ("first", "middle", "last")
    for kind in kinds:
        for num_tokens in BUCKETS:
            segment = build_segment(config, kind, dtype, num_tokens)
            _check_interface(segment, _parse(segment.model.SerializeToString()))
            assert _compile(segment.model.SerializeToString()) > 10_000


def test_attention_bias_mlp_bias_and_softcap_compile() -> None:
    config = tiny_config(
        "llama", has_qkv_bias=True, has_o_bias=True, has_mlp_bias=True, final_logit_softcap=20.0
    )
    assert _compile(build_segment(config, "middle", "bfloat16", 64).model.SerializeToString())
    assert _compile(build_segment(config, "last", "bfloat16", 1).model.SerializeToString())


def test_networks_are_strongly_typed() -> None:
    """A graph that mixes types is refused, so types are ours and not TensorRT's choice."""
    half = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, 4])
    single = helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [2, 4])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "mixed", [half, single], [result]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    with pytest.raises(RuntimeError, match="TensorRT"):
        _compile(model.SerializeToString())


class _Log(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
    """Keeps errors for the message of a failed test."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)


@functools.cache
def _builder() -> tuple[_Log, Any]:
    log = _Log()
    return log, trt.Builder(log)


def _parse(model: bytes) -> Any:
    log, builder = _builder()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        raise RuntimeError(f"TensorRT cannot parse the graph: {log.errors}")
    return network


@functools.cache
def _compile(model: bytes) -> int:
    """Compiles for the compute capabilities of A100, RTX 30, RTX 40, RTX 50; returns the engine's bytes.

    Cached, since llama and mistral are one graph.
    """
    log, builder = _builder()
    network = _parse(model)
    config = builder.create_builder_config()
    capabilities = [getattr(trt.ComputeCapability, name) for name in ("SM80", "SM86", "SM89", "SM120")]
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        config.set_compute_capability(capability, i)
    trt_engine = builder.build_serialized_network(network, config)
    if trt_engine is None:
        raise RuntimeError(f"TensorRT cannot build the graph: {log.errors}")
    return int(trt_engine.nbytes)


def _check_interface(segment: Segment, network: Any) -> None:
    """TensorRT sees the inputs and outputs that the graph declares, with their types and shapes."""

    def described(tensor: Any) -> tuple[str, str, tuple[int, ...]]:
        return tensor.name, tensor.dtype.name, tuple(tensor.shape)

    def declared(info: onnx.ValueInfoProto) -> tuple[str, str, tuple[int, ...]]:
        tensor = info.type.tensor_type
        names = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16"}
        dtype = names[TensorProto.DataType.Name(tensor.elem_type)]
        return info.name, dtype, tuple(dim.dim_value for dim in tensor.shape.dim)

    inputs = [described(network.get_input(i)) for i in range(network.num_inputs)]
    assert inputs == [declared(info) for info in segment.model.graph.input]
    outputs = [described(network.get_output(i)) for i in range(network.num_outputs)]
    assert outputs == [declared(info) for info in segment.model.graph.output]
    for weight in segment.weights:
        assert (weight.name, _DTYPES[weight.dtype], weight.shape) in inputs
