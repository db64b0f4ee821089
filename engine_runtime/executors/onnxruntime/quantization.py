"""From float32 matrix products to int8 ones (W8A8), as a pass over the decoder's graph.

    y = x W^T   becomes   q, s = QuantizeRows(x);  y = Dequantize(MatMulInteger(q, int8 W^T), s, scale of W)

Weights have one scale an output channel, activations one a row, found at run time; both are rotated first,
which spreads outliers (``row_kernels``). The sums are exact integers, so a row's result depends on that row
alone, and tokens do not depend on the batch. A second pass melts these operators into their neighbours: the
README of this package lists what was measured.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from engine_runtime.executors.onnxruntime.decoder_graph import DecoderGraph, own_node
from engine_runtime.executors.onnxruntime.row_kernels import quantize_row_range

ZERO_POINT = 128
_ZERO_POINT_NAME = "quantize/zero_point"
_MULTIPLE = 16  # the row kernels work on whole vectors
_SMALLEST = 64  # a matrix below that is faster as it is
LARGEST_ROTATION = 512


def quantize_weight(
    weight: npt.NDArray[np.float32], rotation: int = 1
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Symmetric int8 with one scale an output channel: W rotated = scale[:, None] * q.

    Args:
        weight: C-contiguous [out, in]; ``in`` is a multiple of 16.
        rotation: of the rows that W will be multiplied with.

    Returns:
        q int8 [out, in] from -127 to 127, scale float32 [out].
    """
    rows, columns = weight.shape
    q = np.empty(weight.shape, np.uint8)
    scale = np.empty(rows, np.float32)
    scratch = np.empty(columns, np.float32)
    quantize_row_range(
        weight.ctypes.data, q.ctypes.data, scale.ctypes.data, scratch.ctypes.data, columns, rotation, 0, rows
    )
    # Neither rotation is normalized: together they multiply by ``rotation``.
    return np.bitwise_xor(q, ZERO_POINT, out=q).view(np.int8), scale / np.float32(rotation)


def rotation_of(columns: int, largest: int = LARGEST_ROTATION) -> int:
    """How many neighbours are rotated together: the largest power of two that divides a row's length."""
    return min(columns & -columns, largest)


def quantize_matmuls(graph: DecoderGraph, largest_rotation: int = LARGEST_ROTATION) -> None:
    """Replaces each product of activations and an eligible weight. Weights must be ``transposed`` already.

    Args:
        largest_rotation: 1 rotates nothing.
    """
    quantized_rows: dict[str, tuple[str, str]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        weight = graph.weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.form != "transposed" or not _is_eligible(weight.shape):
            nodes.append(node)
            continue
        x, name, y = node.input[0], node.input[1], node.output[0]
        columns, outputs = weight.shape
        rotation = rotation_of(columns, largest_rotation)
        path = node.name.rpartition("/")[0]
        if x not in quantized_rows:
            quantized_rows[x] = (f"{path}/q", f"{path}/scale")
            nodes.append(
                own_node(
                    "QuantizeRows",
                    f"{path}/QuantizeRows",
                    [x],
                    list(quantized_rows[x]),
                    columns=columns,
                    rotation=rotation,
                )
            )
        q, scale = quantized_rows[x]
        graph.weights[name] = weight.as_form("int8", rotation)
        graph.weights[f"{name}.scale"] = weight.as_form("scale", rotation)
        nodes.append(
            helper.make_node(
                "MatMulInteger", [q, name, _ZERO_POINT_NAME], [f"{path}/sums"], name=f"{path}/MatMulInteger"
            )
        )
        inputs = [f"{path}/sums", scale, f"{name}.scale"]
        nodes.append(own_node("Dequantize", f"{path}/Dequantize", inputs, [y], columns=outputs))
    graph.nodes = nodes
    graph.constants[_ZERO_POINT_NAME] = numpy_helper.from_array(
        np.array(ZERO_POINT, np.uint8), _ZERO_POINT_NAME
    )


def _is_eligible(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and all(n % _MULTIPLE == 0 and n >= _SMALLEST for n in shape)


def fuse_quantized(graph: DecoderGraph) -> None:
    """Melts QuantizeRows and Dequantize into the norms, gated activations and attentions between them.

    What matches no pattern stays as it is: correct, with more passes over memory.
    """
    find = _Neighbours(graph)
    for node in [n for n in graph.nodes if n.op_type == "QuantizeRows"]:
        for fuse in (_fuse_norm, _fuse_swiglu, _fuse_attention_output):
            if fuse(graph, node, find):
                find = _Neighbours(graph)
                break
    for node in [n for n in graph.nodes if n.op_type.startswith("Attention")]:
        if _fuse_attention_input(graph, node, find):
            find = _Neighbours(graph)


class _Neighbours:
    """The nodes around the values of a graph, as of now."""

    def __init__(self, graph: DecoderGraph) -> None:
        self._producers = graph.producers()
        self._consumers = graph.consumers()

    def producer(self, value: str, op_type: str, num_consumers: int | None = 1) -> onnx.NodeProto | None:
        """The node of this type that computes ``value``, if so many nodes read it (None: however many)."""
        node = self._producers.get(value)
        if node is None or node.op_type != op_type:
            return None
        return node if num_consumers in (None, len(self._consumers[value])) else None


def _fuse_norm(graph: DecoderGraph, quantize: onnx.NodeProto, find: _Neighbours) -> bool:
    """Dequantize, Add, RMSNormalization, QuantizeRows; the sum is also the residual stream."""
    norm = find.producer(quantize.input[0], "RMSNormalization")
    total = find.producer(norm.input[0], "Add", None) if norm else None
    if norm is None or total is None:
        return False
    products = [find.producer(name, "Dequantize") for name in total.input]
    dequantize = products[0] or products[1]
    if dequantize is None:
        return False
    residual = total.input[1 if products[0] else 0]
    attributes = {a.name: helper.get_attribute_value(a) for a in norm.attribute}
    if attributes.get("axis", -1) != -1 or graph.weights[norm.input[1]].form != "plain":
        return False
    fused = own_node(
        "AddRmsNormQuantize",
        f"{norm.name.rpartition('/')[0]}/AddRmsNormQuantize",
        [*dequantize.input, residual, norm.input[1]],
        [total.output[0], *quantize.output],
        columns=_attribute(quantize, "columns"),
        rotation=_attribute(quantize, "rotation"),
        epsilon=attributes.get("epsilon", 1e-5),
    )
    graph.replace([dequantize, total, norm, quantize], fused)
    return True


def _fuse_swiglu(graph: DecoderGraph, quantize: onnx.NodeProto, find: _Neighbours) -> bool:
    """Dequantize, Split, x * sigmoid(x), Mul, QuantizeRows."""
    gated = find.producer(quantize.input[0], "Mul")
    if gated is None:
        return False
    for activated, up in (gated.input, reversed(gated.input)):
        silu = find.producer(activated, "Mul")
        split = find.producer(up, "Split")
        if silu is not None and split is not None:
            break
    else:
        return False
    gate = split.output[0]
    sigmoids = [find.producer(name, "Sigmoid") for name in silu.input]
    sigmoid = next((node for node in sigmoids if node is not None), None)
    dequantize = find.producer(split.input[0], "Dequantize")
    if (
        sigmoid is None
        or dequantize is None
        or list(sigmoid.input) != [gate]
        or gate not in silu.input
        or list(split.output) != [gate, up]
        or len(split.input) != 1
        or _attribute(dequantize, "columns") != 2 * _attribute(quantize, "columns")
    ):
        return False
    fused = own_node(
        "SwigluQuantize",
        f"{gated.name.rpartition('/')[0]}/SwigluQuantize",
        list(dequantize.input),
        list(quantize.output),
        columns=_attribute(quantize, "columns"),
        rotation=_attribute(quantize, "rotation"),
    )
    graph.replace([dequantize, split, sigmoid, silu, gated, quantize], fused)
    return True


def _fuse_attention_output(graph: DecoderGraph, quantize: onnx.NodeProto, find: _Neighbours) -> bool:
    attention = find.producer(quantize.input[0], "Attention")
    if attention is None:
        return False
    fused = onnx.NodeProto()
    fused.CopyFrom(attention)
    fused.op_type = "AttentionToRows"
    fused.output[:] = quantize.output
    fused.attribute.append(helper.make_attribute("rotation", _attribute(quantize, "rotation")))
    graph.replace([attention, quantize], fused)
    return True


def _fuse_attention_input(graph: DecoderGraph, attention: onnx.NodeProto, find: _Neighbours) -> bool:
    dequantize = find.producer(attention.input[0], "Dequantize")
    if dequantize is None:
        return False
    fused = onnx.NodeProto()
    fused.CopyFrom(attention)
    fused.op_type = attention.op_type.replace("Attention", "AttentionFromSums")
    fused.input[:] = dequantize.input
    graph.replace([dequantize, attention], fused)
    return True


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next(int(a.i) for a in node.attribute if a.name == name)
