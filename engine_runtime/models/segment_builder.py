"""Writes the nodes of a segment, named by the paths of the modules that they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from engine_runtime.models.segment import DType, Segment, SegmentKind, WeightInput

OPSET = 24
_IR_VERSION = 11
_DATA_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


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
        self._tape = tape.Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._weight_values: list[ir.Value] = []
        self._weights: list[WeightInput] = []
        self._constants: dict[str, ir.Value] = {}

    def input(self, name: str, width: int) -> ir.Value:
        """A graph input [tokens, width]."""
        value = ir.val(name, _DATA_TYPES[self.dtype], self._token_shape(width))
        self._inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, width: int, dtype: DType | None = None) -> None:
        """Makes ``value`` a graph output [tokens, width]."""
        value.name = name
        value.dtype = _DATA_TYPES[dtype or self.dtype]
        value.shape = ir.Shape(self._token_shape(width))
        self._outputs.append(value)

    def weight(
        self, path: str, shape: tuple[int, ...], parts: Sequence[str] = (), dtype: DType | None = None
    ) -> ir.Value:
        """A weight as a graph input.

        Args:
            path: such as ``layer.mlp.gate_up_proj.weight``.
            parts: paths of the checkpoint's weights that are concatenated to this one; by default ``path``.
        """
        dtype = dtype or self.dtype
        value = ir.val(path, _DATA_TYPES[dtype], shape)
        self._weight_values.append(value)
        sources = tuple(_checkpoint_name(part) for part in parts or (path,))
        self._weights.append(WeightInput(path, shape, sources, dtype))
        return value

    def constant(self, name: str, values: Sequence[int] | float, dtype: DType | None = None) -> ir.Value:
        """A list of int64 (a shape, say), or a scalar of ``dtype``."""
        if name not in self._constants:
            if isinstance(values, Sequence):
                tensor = ir.tensor(np.asarray(values, dtype=np.int64), name=name)
            else:
                tensor = ir.tensor(values, dtype=_DATA_TYPES[dtype or self.dtype], name=name)
            self._constants[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
        return self._constants[name]

    def op(
        self, op_type: str, path: str, *inputs: ir.Value, **attributes: int | float | str | list[int]
    ) -> ir.Value:
        """Adds a node ``path/op_type`` and returns its only output."""
        name = f"{path}/{op_type}"
        value = self._tape.op(op_type, inputs, attributes, name=name)
        value.name = name
        return value

    def split(
        self, path: str, value: ir.Value, count: int, sizes: Sequence[int] | None = None, axis: int = -1
    ) -> list[ir.Value]:
        """Cuts ``value`` into ``count`` pieces along ``axis``, equal ones unless ``sizes`` are given."""
        name = f"{path}/Split"
        if sizes is None:
            inputs, attributes = [value], {"axis": axis, "num_outputs": count}
        else:
            inputs, attributes = [value, self.constant(f"{name}/sizes", sizes)], {"axis": axis}
        pieces = list(self._tape.op_multi_out("Split", inputs, attributes, num_outputs=count, name=name))
        for i, piece in enumerate(pieces):
            piece.name = f"{name}.{i}"
        return pieces

    def cast(self, path: str, value: ir.Value, dtype: DType) -> ir.Value:
        return self.op("Cast", path, value, to=int(_DATA_TYPES[dtype]))

    def build(self) -> Segment:
        """Makes the graph from everything added so far. To be called once."""
        graph = ir.Graph(
            [*self._inputs, *self._weight_values],
            self._outputs,
            nodes=self._tape.nodes,
            initializers=list(self._constants.values()),
            opset_imports={"": OPSET},
            name=self._kind,
        )
        model = ir.to_proto(ir.Model(graph, ir_version=_IR_VERSION, producer_name="inflightd"))
        return Segment(self._kind, self.dtype, self._num_tokens, model, tuple(self._weights))

    def _token_shape(self, width: int) -> list[int | str]:
        return ["num_tokens" if self._num_tokens is None else self._num_tokens, width]


def _checkpoint_name(path: str) -> str:
    first, _, rest = path.partition(".")
    if first in ("layer", "next_layer"):
        return f"model.layers.{{{first}}}.{rest}"
    return path if first == "lm_head" else f"model.{path}"
