"""The graphs themselves: valid ONNX, named like the checkpoint, fed by all of its tensors."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

import engine_runtime.models
from engine_runtime.model_config import ConfigError
from engine_runtime.models.architectures import ARCHITECTURES
from engine_runtime.models.build import build_segment
from engine_runtime.models.segment import DType, Segment, SegmentKind
from engine_runtime.weights.expected_tensors import expected_tensors
from tests.engine_runtime.tiny_configs import tiny_config

KINDS: tuple[SegmentKind, ...] = ("first", "middle", "last")
ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


def declared(values: list[onnx.ValueInfoProto]) -> dict[str, tuple[int, tuple[int | str, ...]]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    }


@pytest.mark.parametrize("num_tokens", [None, 16])
@pytest.mark.parametrize("dtype", list(ELEMENT_TYPES))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_graphs_are_valid_and_have_the_agreed_interface(
    architecture: str, dtype: DType, num_tokens: int | None
) -> None:
    config = tiny_config(architecture)
    tokens = num_tokens or "num_tokens"
    own = ELEMENT_TYPES[dtype]
    hidden, attention, qkv = (own, (tokens, 64)), (own, (tokens, 128)), (own, (tokens, 256))
    interfaces = {
        "first": ({"hidden": hidden}, {"residual_out": hidden, "qkv": qkv}),
        "middle": ({"attention": attention, "residual": hidden}, {"residual_out": hidden, "qkv": qkv}),
        "last": (
            {"attention": attention, "residual": hidden},
            {"logits": (TensorProto.FLOAT, (tokens, 176))},
        ),
    }
    for kind in KINDS:
        segment = build_segment(config, kind, dtype, num_tokens)
        assert (segment.kind, segment.dtype, segment.num_tokens) == (kind, dtype, num_tokens)
        onnx.checker.check_model(segment.model, full_check=True)
        assert [(opset.domain, opset.version) for opset in segment.model.opset_import] == [("", 24)]
        inputs, outputs = interfaces[kind]
        weights = {w.name: (ELEMENT_TYPES[w.dtype], w.shape) for w in segment.weights}
        assert declared(segment.model.graph.input) == inputs | weights
        assert declared(segment.model.graph.output) == outputs


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_segments_use_every_tensor_of_the_checkpoint_once(architecture: str, biases: bool) -> None:
    config = tiny_config(
        architecture,
        has_qkv_bias=biases or architecture == "qwen2",
        has_o_bias=biases,
        has_mlp_bias=biases,
        num_hidden_layers=3,
        layers=tiny_config(architecture).layers[:1] * 3,
    )
    expected = expected_tensors(config)
    places: list[tuple[Segment, int | None, int | None]] = [(build_segment(config, "first"), None, 0)]
    places += [(build_segment(config, "middle"), i, i + 1) for i in range(2)]
    places.append((build_segment(config, "last"), 2, None))
    used: Counter[str] = Counter({"model.embed_tokens.weight": 1})
    for segment, layer, next_layer in places:
        for weight in segment.weights:
            sources = weight.source_names(layer=layer, next_layer=next_layer)
            used.update(sources)
            shapes = [expected[source] for source in sources]
            assert weight.shape == (sum(shape[0] for shape in shapes), *shapes[0][1:]), weight.name
    assert used == Counter(expected.keys())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_node_names_are_unique_paths_of_modules(architecture: str) -> None:
    config = tiny_config(architecture)
    segments = [build_segment(config, kind) for kind in KINDS]
    modules = {weight.name.rsplit(".", 1)[0] for segment in segments for weight in segment.weights}
    assert "layer.mlp.down_proj" in modules
    for segment in segments:
        names = [node.name for node in segment.model.graph.node]
        assert len(names) == len(set(names))
        assert all("/" in name for name in names)
        matmuls = {name.removesuffix("/MatMul") for name in names if name.endswith("/MatMul")}
        assert matmuls <= modules


def test_one_module_for_each_architecture() -> None:
    folder = Path(engine_runtime.models.__file__).parent
    assert all((folder / f"{name}.py").exists() for name in ARCHITECTURES)


def test_unknown_architecture_is_refused_by_naming_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="'gpt2' is not supported; supported are gemma3, llama, mistral, qwen2"
    ):
        build_segment(tiny_config("gpt2"), "first")


def test_norms_of_half_precision_graphs_do_not_overflow() -> None:
    """The squares of a few hundred overflow float16: they must be summed in float32."""
    segment = build_segment(tiny_config("llama"), "first", "float16")
    session = onnxruntime.InferenceSession(
        segment.model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    weights = {w.name: np.zeros(w.shape, np.float16) for w in segment.weights}
    weights["next_layer.input_layernorm.weight"][:] = 1
    np.fill_diagonal(weights["next_layer.self_attn.qkv_proj.weight"], 1)
    hidden = np.full((1, 64), 3000, np.float16)
    _, qkv = session.run(None, {"hidden": hidden, **weights})
    np.testing.assert_array_equal(qkv[0, :64], 1)


def test_final_softcap_bounds_the_logits() -> None:
    config = tiny_config("gemma3", final_logit_softcap=5.0)
    capped, plain = (
        build_segment(c, "last") for c in (config, tiny_config("gemma3", final_logit_softcap=None))
    )
    random = np.random.RandomState(0)
    feeds = {w.name: random.standard_normal(w.shape).astype(np.float32) for w in capped.weights}
    feeds["attention"] = random.standard_normal((3, 128)).astype(np.float32)
    feeds["residual"] = random.standard_normal((3, 64)).astype(np.float32)
    logits = [
        onnxruntime.InferenceSession(s.model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, feeds
        )[0]
        for s in (capped, plain)
    ]
    assert np.abs(logits[1]).max() > 5
    np.testing.assert_allclose(logits[0], 5 * np.tanh(logits[1] / 5), rtol=1e-5, atol=1e-5)


def test_any_number_of_tokens_gives_the_same_rows() -> None:
    segment = build_segment(tiny_config("qwen3"), "middle")
    session = onnxruntime.InferenceSession(
        segment.model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    random = np.random.RandomState(1)
    weights = {
        w.name: (random.standard_normal(w.shape) / math.sqrt(w.shape[-1])).astype(np.float32)
        for w in segment.weights
    }
    attention = random.standard_normal((7, 128)).astype(np.float32)
    residual = random.standard_normal((7, 64)).astype(np.float32)
    together = session.run(None, {"attention": attention, "residual": residual, **weights})
    for row in range(7):
        rows = slice(row, row + 1)
        alone = session.run(None, {"attention": attention[rows], "residual": residual[rows], **weights})
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], b[row], rtol=1e-5, atol=1e-5)
