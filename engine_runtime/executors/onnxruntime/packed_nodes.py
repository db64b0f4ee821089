"""The nodes of a quantized graph, with products that read packed weights and take in what follows them.

    MatMulInteger, Dequantize         PackedProductFloats
    MatMulInteger, SwigluQuantize     PackedProductSwiglu, QuantizeRows
    MatMulInteger, Attention...Sums   PackedProductFloats, Attention
    MatMulInteger                     PackedProduct

All compute the same bits as the nodes that they replace.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import helper

from engine_runtime.executors.onnxruntime.decoder_graph import DecoderGraph, own_node

WEIGHT = "weight"
"""Attribute of a packed product: the name of its matrix."""


@dataclass(frozen=True)
class PackedNodes:
    """
    Attributes:
        nodes: in an order in which they can run.
        gated: matrices whose tiles of gate and up take turns.
    """

    nodes: list[onnx.NodeProto]
    gated: frozenset[str]


def packed_nodes(graph: DecoderGraph) -> PackedNodes:
    """Leaves ``graph`` as it is."""
    consumers = graph.consumers()
    nodes: list[onnx.NodeProto] = []
    gated: set[str] = set()
    replaced: dict[int, onnx.NodeProto | None] = {}
    for node in graph.nodes:
        if id(node) in replaced:
            successor = replaced[id(node)]
            if successor is not None:
                nodes.append(successor)
            continue
        if node.op_type != "MatMulInteger":
            nodes.append(node)
            continue
        x, matrix = node.input[:2]
        sums = node.output[0]
        path = node.name.rpartition("/")[0]
        readers = consumers[sums]
        reader = readers[0] if len(readers) == 1 and readers[0].input[0] == sums else None
        op_type, inputs, output = "PackedProduct", [x], sums
        if reader is not None and reader.op_type == "Dequantize":
            op_type, inputs, output = "PackedProductFloats", [x, *reader.input[1:]], reader.output[0]
            replaced[id(reader)] = None
        elif reader is not None and reader.op_type.startswith("AttentionFromSums"):
            op_type, inputs, output = "PackedProductFloats", [x, *reader.input[1:]], f"{path}/floats"
            attention = onnx.NodeProto()
            attention.CopyFrom(reader)
            attention.op_type = reader.op_type.replace("FromSums", "")
            attention.input[:] = [output]
            replaced[id(reader)] = attention
        elif reader is not None and reader.op_type == "SwigluQuantize":
            op_type, inputs, output = "PackedProductSwiglu", [x, *reader.input[1:]], f"{path}/gated"
            gated.add(matrix)
            quantize = own_node("QuantizeRows", f"{path}/QuantizeRows", [output], list(reader.output))
            quantize.attribute.extend(reader.attribute)
            replaced[id(reader)] = quantize
        product = own_node(op_type, f"{path}/{op_type}", inputs, [output])
        product.attribute.append(helper.make_attribute(WEIGHT, matrix))
        nodes.append(product)
    return PackedNodes(nodes, frozenset(gated))
