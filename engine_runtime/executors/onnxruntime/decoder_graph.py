"""The whole decoder as one graph: its segments, with attention between them as nodes.

    hidden -> first -> Attention 0 -> middle -> Attention 1 -> ... -> Attention L-1 -> last -> logits

One graph is one call into ONNX Runtime for a step. The nodes are those of the segments, under the names of
their own layer; weights stay references to the checkpoint, so that passes can say how each is to be stored
before any is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import onnx
from onnx import helper

from engine_runtime.executors.onnxruntime.operators import DOMAIN
from engine_runtime.model_config import ModelConfig
from engine_runtime.models.build import build_segment
from engine_runtime.models.segment import SegmentKind, WeightInput

Form = Literal["plain", "transposed", "int8", "scale"]
"""How a weight is stored: as in the checkpoint; [in, out]; [in, out] in int8; a scale for each output."""

HIDDEN = "hidden"
SAMPLED_ROWS = "sampled_rows"
LOGITS = "logits"
LAST_NORM = "norm.weight"


@dataclass(frozen=True)
class StoredWeight:
    """One initializer of the graph and where it comes from.

    Attributes:
        rotation: of the rows that an int8 matrix is multiplied with, see ``row_kernels``.
    """

    weight: WeightInput
    layer: int | None
    next_layer: int | None
    form: Form
    rotation: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        match self.form:
            case "plain":
                return self.weight.shape
            case "scale":
                return self.weight.shape[:1]
            case _:
                return self.weight.shape[::-1]

    @property
    def num_bytes(self) -> int:
        size = 1 if self.form == "int8" else 4
        for extent in self.shape:
            size *= extent
        return size

    def as_form(self, form: Form, rotation: int = 1) -> StoredWeight:
        return replace(self, form=form, rotation=rotation)


@dataclass
class DecoderGraph:
    """A graph under construction. Passes change it in place.

    Attributes:
        nodes: in an order in which they can run.
        weights: name of an initializer: what to fill it with.
        constants: initializers with their values.
        residual: name of the value [R, H] that the last norm reads. It survives all passes.
        opset: version of the standard operators.
    """

    config: ModelConfig
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    residual: str = ""
    opset: int = 24
    ir_version: int = 11

    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that computes each value."""
        return {name: node for node in self.nodes for name in node.output}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read each value."""
        found: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                found[name].append(node)
        return found

    def replace(self, replaced: Iterable[onnx.NodeProto], *nodes: onnx.NodeProto) -> None:
        """Puts ``nodes`` where the last of ``replaced`` stood."""
        gone = {id(node) for node in replaced}
        last = max(i for i, node in enumerate(self.nodes) if id(node) in gone)
        self.nodes[last : last + 1] = [*nodes, self.nodes[last]]
        self.nodes = [node for node in self.nodes if id(node) not in gone]


def own_node(
    op_type: str, name: str, inputs: list[str], outputs: list[str], **attributes: int | float
) -> onnx.NodeProto:
    """A node of one of our operators."""
    return helper.make_node(op_type, inputs, outputs, name=name, domain=DOMAIN, **attributes)


def build_decoder(config: ModelConfig) -> DecoderGraph:
    """Joins the float32 segments of all layers.

    The graph maps ``hidden`` [T, H], the scaled embeddings, and ``sampled_rows`` int64 [R] to ``logits`` [R,
    V].

    Raises:
        ConfigError: the architecture is not supported.
    """
    graph = DecoderGraph(config)
    last_layer = config.num_hidden_layers - 1
    segments: dict[SegmentKind, onnx.ModelProto] = {}
    weights: dict[SegmentKind, tuple[WeightInput, ...]] = {}
    kinds: tuple[SegmentKind, ...] = ("first", "middle", "last")
    for kind in kinds:
        segment = build_segment(config, kind)
        segments[kind], weights[kind] = segment.model, segment.weights
    graph.opset = segments["first"].opset_import[0].version
    graph.ir_version = segments["first"].ir_version

    def add(kind: SegmentKind, layer: int | None, next_layer: int | None, values: dict[str, str]) -> None:
        """Copies a segment; ``values`` names its inputs and outputs."""

        def rename(name: str) -> str:
            if name in values:
                return values[name]
            path, separator, rest = name.partition(".")
            if separator and path == "layer":
                return f"model.layers.{layer}.{rest}"
            if separator and path == "next_layer":
                return f"model.layers.{next_layer}.{rest}"
            return name

        for original in segments[kind].graph.node:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            node.name = rename(original.name)
            node.input[:] = [rename(name) for name in original.input]
            node.output[:] = [rename(name) for name in original.output]
            graph.nodes.append(node)
        for tensor in segments[kind].graph.initializer:
            constant = onnx.TensorProto()
            constant.CopyFrom(tensor)
            constant.name = rename(tensor.name)
            graph.constants[constant.name] = constant
        for weight in weights[kind]:
            graph.weights[rename(weight.name)] = StoredWeight(weight, layer, next_layer, "plain")

    add("first", None, 0, {HIDDEN: HIDDEN, "residual_out": "residual.0", "qkv": "qkv.0"})
    for layer in range(config.num_hidden_layers):
        graph.nodes.append(
            own_node(
                "Attention",
                f"model.layers.{layer}.self_attn",
                [f"qkv.{layer}"],
                [f"attention.{layer}"],
                layer=layer,
            )
        )
        names = {"attention": f"attention.{layer}", "residual": f"residual.{layer}"}
        if layer < last_layer:
            names |= {"residual_out": f"residual.{layer + 1}", "qkv": f"qkv.{layer + 1}"}
            add("middle", layer, layer + 1, names)
        else:
            for kept, name in (("attention", names["attention"]), ("residual", names["residual"])):
                graph.nodes.append(
                    helper.make_node(
                        "Gather",
                        [name, SAMPLED_ROWS],
                        [f"sampled_{kept}"],
                        name=f"sampled_{kept}/Gather",
                        axis=0,
                    )
                )
            add(
                "last",
                layer,
                None,
                {"attention": "sampled_attention", "residual": "sampled_residual", LOGITS: LOGITS},
            )
    _drop_identities(graph)
    graph.residual = next(node.input[0] for node in graph.nodes if LAST_NORM in node.input)
    return graph


def _drop_identities(graph: DecoderGraph) -> None:
    """``first`` has one, since an output of a segment needs a node of its own."""
    same = {node.output[0]: node.input[0] for node in graph.nodes if node.op_type == "Identity"}
    graph.nodes = [node for node in graph.nodes if node.op_type != "Identity"]
    for node in graph.nodes:
        node.input[:] = [same.get(name, name) for name in node.input]


def transpose_weights(graph: DecoderGraph) -> None:
    """Stores [in, out] what a Transpose node would make so, and drops the node."""
    transposed: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type == "Transpose" and node.input[0] in graph.weights:
            name = node.input[0]
            graph.weights[name] = graph.weights[name].as_form("transposed")
            transposed[node.output[0]] = name
    graph.nodes = [node for node in graph.nodes if not (node.output and node.output[0] in transposed)]
    for node in graph.nodes:
        node.input[:] = [transposed.get(name, name) for name in node.input]
