"""Writes the nodes of a segment, named by the paths of the modules that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NewType

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine_runtime.models.segment import DType, Segment, SegmentKind, WeightInput

OPSET = 24
_IR_VERSION = 11
_DATA_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
_NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

Value = NewType("Value", str)
"""A tensor of the graph: its name."""


class SegmentBuilder:
    """Collects inputs, weights and nodes, then makes the graph.

    Paths start with ``layer`` or ``next_layer`` for modules of a decoder layer, and are otherwise the
    checkpoint's own (``norm``, ``lm_head``).

    Attributes:
        dtype: of the inputs, the weights and, unless cast, everything computed from them.
    """

    def __init__(self, kind: SegmentKind, dtype: DType, num_tokens: int | None) -> None:
        self.dtype = dtype
        self._kind = kind
        self._num_tokens = num_tokens
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: dict[str, onnx.ValueInfoProto] = {}
        self._weight_inputs: list[onnx.ValueInfoProto] = []
        self._weights: list[WeightInput] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def input(self, name: str, width: int) -> Value:
        """A graph input [tokens, width]."""
        self._inputs.append(self._tokens_by(name, width, self.dtype))
        return Value(name)

    def output(self, name: str, value: Value, width: int, dtype: DType | None = None) -> None:
        """Makes ``value``, which a node computes, a graph output [tokens, width]."""
        self._outputs[value] = self._tokens_by(name, width, dtype or self.dtype)

    def weight(
        self, path: str, shape: tuple[int, ...], parts: Sequence[str] = (), dtype: DType | None = None
    ) -> Value:
        """A weight as a graph input.

        Args:
            path: such as ``layer.mlp.gate_up_proj.weight``.
            parts: paths of the checkpoint's weights that are concatenated to this one; by default ``path``.
        """
        dtype = dtype or self.dtype
        self._weight_inputs.append(helper.make_tensor_value_info(path, _DATA_TYPES[dtype], shape))
        sources = tuple(_checkpoint_name(part) for part in parts or (path,))
        self._weights.append(WeightInput(path, shape, sources, dtype))
        return Value(path)

    def constant(self, name: str, values: Sequence[int] | float, dtype: DType | None = None) -> Value:
        """A list of int64 (a shape, say), or a scalar of ``dtype``."""
        if name not in self._constants:
            is_list = isinstance(values, Sequence)
            array = np.asarray(values, np.int64 if is_list else _NUMPY_TYPES[dtype or self.dtype])
            self._constants[name] = numpy_helper.from_array(array, name)
        return Value(name)

    def op(
        self, op_type: str, path: str, *inputs: Value, **attributes: int | float | str | list[int]
    ) -> Value:
        """Adds a node ``path/op_type`` and returns its only output."""
        name = f"{path}/{op_type}"
        self._nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return Value(name)

    def split(
        self, path: str, value: Value, count: int, sizes: Sequence[int] | None = None, axis: int = -1
    ) -> list[Value]:
        """Cuts ``value`` into ``count`` pieces along ``axis``, equal ones unless ``sizes`` are given."""
        name = f"{path}/Split"
        pieces = [Value(f"{name}.{i}") for i in range(count)]
        if sizes is None:
            node = helper.make_node("Split", [value], pieces, name, axis=axis, num_outputs=count)
        else:
            lengths = self.constant(f"{name}/sizes", sizes)
            node = helper.make_node("Split", [value, lengths], pieces, name, axis=axis)
        self._nodes.append(node)
        return pieces

    def cast(self, path: str, value: Value, dtype: DType) -> Value:
        return self.op("Cast", path, value, to=int(_DATA_TYPES[dtype]))

    def build(self) -> Segment:
        """Makes the graph from everything added so far. To be called once."""
        for node in self._nodes:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name in self._outputs:
                        names[i] = self._outputs[name].name
        graph = helper.make_graph(
            self._nodes,
            self._kind,
            [*self._inputs, *self._weight_inputs],
            list(self._outputs.values()),
            list(self._constants.values()),
        )
        model = helper.make_model(
            graph,
            ir_version=_IR_VERSION,
            producer_name="inflightd",
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        return Segment(self._kind, self.dtype, self._num_tokens, model, tuple(self._weights))

    def _tokens_by(self, name: str, width: int, dtype: DType) -> onnx.ValueInfoProto:
        tokens = "num_tokens" if self._num_tokens is None else self._num_tokens
        return helper.make_tensor_value_info(name, _DATA_TYPES[dtype], [tokens, width])


def _checkpoint_name(path: str) -> str:
    first, _, rest = path.partition(".")
    if first in ("layer", "next_layer"):
        return f"model.layers.{{{first}}}.{rest}"
    return path if first == "lm_head" else f"model.{path}"
