"""The nodes of a decoder's graph that are ours, each with its kernels and its state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from engine_runtime.executors.onnxruntime import attention_kernels as attention
from engine_runtime.executors.onnxruntime import packed_product as product
from engine_runtime.executors.onnxruntime import row_kernels
from engine_runtime.executors.onnxruntime.decoder_graph import SAMPLED_ROWS, DecoderGraph
from engine_runtime.executors.onnxruntime.operators import (
    ADDRESSES,
    DOMAIN,
    Operator,
    OperatorTable,
    compiled,
)
from engine_runtime.executors.onnxruntime.packed_nodes import WEIGHT
from engine_runtime.executors.onnxruntime.packed_weights import PackedWeights
from engine_runtime.executors.onnxruntime.step_record import (
    NUM_TASKS,
    PRODUCT_TASKS,
    SAMPLED,
    SEQUENCES,
    TOKENS,
    UNITS,
    StepRecord,
)
from engine_runtime.kernels.cpu import NO_WINDOW, KvCache, padded_head_dim
from engine_runtime.model_config import ModelConfig
from engine_runtime.rope import RopeConfig, rope_tables

_SUMS = (np.int32, np.float32, np.float32)
_ROWS = (np.uint8, np.float32)
_FLOATS = (np.float32,)

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("QuantizeRows", _FLOATS, _ROWS),
        Operator("Dequantize", _SUMS, _FLOATS),
        Operator("SwigluQuantize", _SUMS, _ROWS),
        Operator("AddRmsNormQuantize", (*_SUMS, np.float32, np.float32), (np.float32, *_ROWS)),
        Operator("Attention", _FLOATS, _FLOATS),
        Operator("AttentionToRows", _FLOATS, _ROWS),
        Operator("AttentionFromSums", _SUMS, _FLOATS),
        Operator("AttentionFromSumsToRows", _SUMS, _ROWS),
        Operator("PackedProduct", (np.uint8,), (np.int32,)),
        Operator("PackedProductFloats", (np.uint8, np.float32, np.float32), _FLOATS),
        Operator("PackedProductSwiglu", (np.uint8, np.float32, np.float32), _FLOATS),
    )
}
PACKED_RESULTS = {
    "PackedProduct": product.SUMS,
    "PackedProductFloats": product.FLOATS,
    "PackedProductSwiglu": product.SWIGLU,
}
ROW_KERNELS = {
    "QuantizeRows": row_kernels.quantize_rows,
    "Dequantize": row_kernels.dequantize,
    "SwigluQuantize": row_kernels.swiglu_quantize,
    "AddRmsNormQuantize": row_kernels.add_rms_norm_quantize,
}


class NodeStates:
    """Makes the states of a decoder's nodes. Must live as long as the sessions that run them.

    Attributes:
        table: the states and the operators.
    """

    def __init__(
        self, config: ModelConfig, cache: KvCache, record: StepRecord, *, max_tokens: int, max_len: int
    ) -> None:
        """
        Args:
            record: what all nodes read about a step.
            max_len: positions that the rotary tables cover.
        """
        self._config = config
        self._cache = cache
        self._record = record
        self.table = OperatorTable(record.words)
        self._max_len = max_len
        self._rope: dict[RopeConfig, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = {}
        self._qkv = np.empty((max_tokens, config.qkv_size), np.float32)
        self._attention = np.empty((max_tokens, config.q_size), np.float32)
        self._scratch = _task_scratch(config, record.max_tasks)

    def nodes(
        self, graph: DecoderGraph, nodes: Sequence[onnx.NodeProto], packed: PackedWeights | None = None
    ) -> list[onnx.NodeProto]:
        """Nodes made from a graph; those of ours select their state instead of naming attributes.

        Args:
            packed: the matrices of packed products, if there are any.
        """
        matrices = [_text(node, WEIGHT) for node in nodes if node.op_type in PACKED_RESULTS]
        following = dict(zip(matrices, [*matrices[1:], *matrices[:1]], strict=True))
        result: list[onnx.NodeProto] = []
        for original, rows in zip(nodes, _rows_of(nodes), strict=True):
            node = onnx.NodeProto()
            node.CopyFrom(original)
            if node.op_type in PACKED_RESULTS and packed is not None:
                matrix = _text(node, WEIGHT)
                state = self._product_state(graph, node.op_type, matrix, following[matrix], packed, rows)
            elif node.domain == DOMAIN:
                attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                state = self._node_state(node.op_type, attributes, rows)
            if node.domain == DOMAIN:
                del node.attribute[:]
                node.attribute.append(helper.make_attribute("node", state))
            result.append(node)
        return result

    def _product_state(
        self, graph: DecoderGraph, op_type: str, matrix: str, after: str, packed: PackedWeights, rows: int
    ) -> int:
        """``after`` is the matrix that the step multiplies with next."""
        columns, outputs = graph.weights[matrix].shape
        operator, result = OPERATORS[op_type], PACKED_RESULTS[op_type]
        extra = np.zeros(product.NUM_EXTRA, np.int64)
        first = product.WEIGHTS
        extra[product.WEIGHTS - first] = packed.address(matrix)
        extra[product.OUTPUTS - first] = outputs
        extra[product.PARTS - first] = self._record.words[PRODUCT_TASKS]
        extra[product.RESULT - first] = result
        extra[product.LEAST_TILED - first] = product.least_tiled(columns)
        extra[product.NEXT - first :] = packed.address(after), *graph.weights[after].shape
        return self.table.add_node(
            rows=rows,
            kernels=[(compiled(product.packed_product).address, PRODUCT_TASKS)],
            num_inputs=len(operator.inputs),
            output_columns=[outputs // 2 if result == product.SWIGLU else outputs],
            columns=columns,
            scratch=(self._scratch.ctypes.data, self._scratch.strides[0]),
            extra=extra.tolist(),
        )

    def kernels(self, nodes: Sequence[onnx.NodeProto]) -> list[Any]:
        """What nodes need compiled: seconds the first time, then read from numba's cache on disk."""
        found: dict[Any, None] = {}
        for op_type in sorted({node.op_type for node in nodes if node.domain == DOMAIN}):
            if op_type in PACKED_RESULTS:
                found[product.packed_product] = None
            elif op_type in ROW_KERNELS:
                found[ROW_KERNELS[op_type]] = None
            else:
                found.update(dict.fromkeys(kernel for kernel, _ in self._attention_kernels(op_type)))
        return list(found)

    def _attention_kernels(self, op_type: str) -> list[tuple[Any, int]]:
        """The kernels of an attention, in order, and where in the step record each finds its cut."""
        operator = OPERATORS[op_type]
        if self._cache.layer(0).data.dtype == np.uint16:
            write, attend = attention.write_kv_float16, attention.attend_float16
        else:
            write, attend = attention.write_kv_float32, attention.attend_float32
        kernels: list[tuple[Any, int]] = [(write, SEQUENCES), (attend, UNITS)]
        if operator.inputs == _SUMS:
            kernels.insert(0, (attention.dequantize_qkv, TOKENS))
        if operator.outputs == _ROWS:
            kernels.append((attention.quantize_attention, TOKENS))
        return kernels

    def _node_state(self, op_type: str, attributes: dict[str, Any], rows: int) -> int:
        if op_type.startswith("Attention"):
            return self._attention_state(
                op_type, int(attributes["layer"]), int(attributes.get("rotation", 1))
            )
        columns = int(attributes["columns"])
        operator = OPERATORS[op_type]
        return self.table.add_node(
            rows=rows,
            kernels=[(compiled(ROW_KERNELS[op_type]).address, rows + NUM_TASKS)],
            num_inputs=len(operator.inputs),
            output_columns=_output_columns(operator, columns),
            columns=columns,
            constant=float(attributes.get("epsilon", 0.0)),
            rotation=int(attributes.get("rotation", 1)),
            scratch=(self._scratch.ctypes.data, self._scratch.strides[0]),
        )

    def _attention_state(self, op_type: str, layer: int, rotation: int) -> int:
        config, operator = self._config, OPERATORS[op_type]
        from_sums, to_rows = operator.inputs == _SUMS, operator.outputs == _ROWS
        kind = config.layers[layer]
        cache = self._cache.layer(layer).data
        if kind.rope not in self._rope:
            self._rope[kind.rope] = rope_tables(kind.rope, config.head_dim, self._max_len)
        cos, sin = self._rope[kind.rope]
        extra = np.zeros(attention.NUM_EXTRA, np.int64)
        first = attention.STEP
        extra[attention.STEP - first] = self._record.words.ctypes.data
        extra[attention.QKV - first] = self._qkv.ctypes.data if from_sums else 0
        extra[attention.OUT - first] = self._attention.ctypes.data if to_rows else 0
        extra[attention.CACHE - first] = cache.ctypes.data
        extra[attention.CACHE_SIZE - first] = cache.size
        extra[attention.COS - first] = cos.ctypes.data
        extra[attention.SIN - first] = sin.ctypes.data
        extra[attention.MAX_LEN - first] = self._max_len
        extra[attention.NUM_HEADS - first] = config.num_attention_heads
        extra[attention.NUM_KV_HEADS - first] = config.num_key_value_heads
        extra[attention.HEAD_DIM - first] = config.head_dim
        extra[attention.VALUE_DIM - first] = padded_head_dim(config.head_dim)
        extra[attention.BLOCK_SIZE - first] = self._cache.block_size
        extra[attention.SLIDING_WINDOW - first] = kind.sliding_window or NO_WINDOW
        scale, softcap = attention.SCALE - first, attention.SOFTCAP - first
        extra[scale : scale + 1].view(np.float32)[0] = config.attention_scale
        extra[softcap : softcap + 1].view(np.float32)[0] = config.attention_logit_softcap or 0.0
        extra[attention.FIRST_OUTPUT - first] = ADDRESSES + len(operator.inputs)
        return self.table.add_node(
            rows=TOKENS,
            kernels=[
                (compiled(kernel).address, cut + NUM_TASKS)
                for kernel, cut in self._attention_kernels(op_type)
            ],
            num_inputs=len(operator.inputs),
            output_columns=_output_columns(operator, config.q_size),
            columns=config.qkv_size,
            rotation=rotation,
            scratch=(self._scratch.ctypes.data, self._scratch.strides[0]),
            extra=extra.tolist(),
        )


def _rows_of(nodes: Sequence[onnx.NodeProto]) -> list[int]:
    """Where the step record has the number of rows of each node: tokens, or sampled ones behind Gather."""
    sampled = {SAMPLED_ROWS}
    result: list[int] = []
    for node in nodes:
        is_sampled = bool(sampled.intersection(node.input))
        if is_sampled:
            sampled.update(node.output)
        result.append(SAMPLED if is_sampled else TOKENS)
    return result


def _text(node: onnx.NodeProto, attribute: str) -> str:
    return next(str(a.s, "utf-8") for a in node.attribute if a.name == attribute)


def _output_columns(operator: Operator, columns: int) -> Sequence[int]:
    """A float output after quantized rows is their scale, one number a row."""
    result: list[int] = []
    for i, _ in enumerate(operator.outputs):
        result.append(0 if i and operator.outputs[i - 1] is np.uint8 else columns)
    return result


def _task_scratch(config: ModelConfig, max_tasks: int) -> npt.NDArray[np.uint8]:
    """One row a task, for whichever kernel needs most; in whole pages, so that tasks share no cache line."""
    value_dim = padded_head_dim(config.head_dim)
    size = max(
        4 * config.intermediate_size,
        4 * config.hidden_size,
        4 * config.q_size,
        product.SCRATCH_BYTES,
        attention.scratch_bytes(config.num_attention_heads, config.num_key_value_heads, value_dim),
    )
    return np.zeros((max_tasks, -(-size // 4096) * 4096), np.uint8)
