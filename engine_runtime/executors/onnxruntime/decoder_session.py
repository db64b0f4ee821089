"""The decoder's graph compiled to one session of ONNX Runtime, with its weights and its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from engine_runtime.executors.onnxruntime import attention_kernels as attention
from engine_runtime.executors.onnxruntime import row_kernels
from engine_runtime.executors.onnxruntime.decoder_graph import (
    HIDDEN,
    LAST_NORM,
    LOGITS,
    SAMPLED_ROWS,
    DecoderGraph,
    StoredWeight,
)
from engine_runtime.executors.onnxruntime.operators import (
    ADDRESSES,
    DOMAIN,
    Operator,
    OperatorTable,
    compiled,
)
from engine_runtime.executors.onnxruntime.ort_session import OrtSession, external_initializer, packs_matrices
from engine_runtime.executors.onnxruntime.quantization import quantize_weight
from engine_runtime.executors.onnxruntime.step_record import (
    NUM_TASKS,
    SAMPLED,
    SEQUENCES,
    TOKENS,
    UNITS,
    StepRecord,
)
from engine_runtime.kernels.cpu import NO_WINDOW, KvCache, padded_head_dim
from engine_runtime.model_config import ModelConfig
from engine_runtime.rope import RopeConfig, rope_tables
from engine_runtime.weights.checkpoint import Checkpoint

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
    )
}
ROW_KERNELS = {
    "QuantizeRows": row_kernels.quantize_rows,
    "Dequantize": row_kernels.dequantize,
    "SwigluQuantize": row_kernels.swiglu_quantize,
    "AddRmsNormQuantize": row_kernels.add_rms_norm_quantize,
}


class DecoderSession:
    """Runs steps of a whole decoder.

    Attributes:
        hidden: float32 [max_tokens, H]: the executor writes the scaled embeddings of a step to its first
        rows.
        logits: float32 [max_sampled, V]: the result.
    """

    def __init__(
        self,
        graph: DecoderGraph,
        checkpoint: Checkpoint,
        cache: KvCache,
        *,
        max_tokens: int,
        max_sampled: int,
        max_len: int,
        num_threads: int,
        progress: Callable[[str, int, int], None] | None = None,
        profile_prefix: Path | None = None,
    ) -> None:
        """Reads the weights and compiles the graph.

        Args:
            max_tokens, max_sampled: largest step.
            max_len: positions that the rotary tables cover.
            progress: called with (what is being done, how much is done, how much there is).

        Raises:
            CheckpointError: a tensor cannot be read.
            OnnxRuntimeError: the graph is refused.
        """
        config = graph.config
        self._config = config
        self._cache = cache
        self.record = StepRecord(
            num_threads, config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        )
        self._table = OperatorTable(self.record.words)
        self._max_len = max_len
        self._rope: dict[RopeConfig, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = {}
        self._qkv = np.empty((max_tokens, config.qkv_size), np.float32)
        self._attention = np.empty((max_tokens, config.q_size), np.float32)
        self._scratch = _task_scratch(config, self.record.max_tasks)
        self.hidden = np.empty((max_tokens, config.hidden_size), np.float32)
        self.logits = np.empty((max_sampled, config.vocab_size), np.float32)
        self._residual = np.empty((max_sampled, config.hidden_size), np.float32)
        self._residual_name = graph.residual
        self._bound = (-1, -1)

        report = progress or (lambda what, done, total: None)
        kernels = self._kernels(graph)
        for i, kernel in enumerate(kernels):
            report("kernels", i, len(kernels))
            compiled(kernel)
        report("kernels", len(kernels), len(kernels))
        model = self._lower(graph)
        weights: dict[str, npt.NDArray[Any]] = {}
        for i, (name, stored) in enumerate(graph.weights.items()):
            if name not in weights:
                weights.update(_load(name, stored, checkpoint))
            report("weights", i + 1, len(graph.weights))
        used = {node.op_type for node in graph.nodes if node.domain == DOMAIN}
        self._session = OrtSession(
            model,
            weights,
            [self._table.build(OPERATORS[name]) for name in sorted(used)],
            DOMAIN,
            num_threads=num_threads,
            profile_prefix=profile_prefix,
        )
        if packs_matrices():
            weights = {name: array for name, array in weights.items() if array.ndim < 2}
        self._weights = weights  # read in place
        self._last_norm: npt.NDArray[np.float32] = weights[LAST_NORM]

    def run(self, sampled_rows: npt.NDArray[np.int64]) -> None:
        """Computes a step that ``record`` describes and whose embeddings are in ``hidden``.

        Args:
            sampled_rows: [R], rows of the step whose logits are wanted; ``logits[:R]`` receives them.

        Raises:
            OnnxRuntimeError: an operator failed.
        """
        num_tokens, num_sampled = int(self.record.words[TOKENS]), len(sampled_rows)
        if self._bound != (num_tokens, num_sampled):
            self._session.bind_input(HIDDEN, self.hidden[:num_tokens])
            self._session.bind_output(LOGITS, self.logits[:num_sampled])
            self._session.bind_output(self._residual_name, self._residual[:num_sampled])
            self._bound = (num_tokens, num_sampled)
        self._session.bind_input(SAMPLED_ROWS, sampled_rows)
        self._session.run()

    def final_hidden(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """The final hidden states [N, H] of rows of ``logits``, normalized as the last product reads them."""
        rows = self._residual[start:stop]
        mean_square = np.mean(np.square(rows), axis=-1, keepdims=True)
        factor: npt.NDArray[np.float32] = 1 / np.sqrt(mean_square + np.float32(self._config.rms_norm_eps))
        return rows * factor * self._last_norm

    def close(self) -> None:
        self._session.close()

    def _lower(self, graph: DecoderGraph) -> bytes:
        """Gives every node of ours its state, and serializes the graph without its weights."""
        sampled = {SAMPLED_ROWS}
        nodes: list[onnx.NodeProto] = []
        for original in graph.nodes:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            if sampled.intersection(node.input):
                sampled.update(node.output)
            if node.domain == DOMAIN:
                attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                del node.attribute[:]
                rows = SAMPLED if sampled.intersection(node.input) else TOKENS
                state = self._node_state(node.op_type, attributes, rows)
                node.attribute.append(helper.make_attribute("node", state))
            nodes.append(node)
        initializers = [
            external_initializer(
                name, np.dtype(np.int8 if stored.form == "int8" else np.float32), stored.shape
            )
            for name, stored in graph.weights.items()
        ]
        hidden, vocabulary = self._config.hidden_size, self._config.vocab_size
        lowered = helper.make_graph(
            nodes,
            "decoder",
            [
                helper.make_tensor_value_info(HIDDEN, TensorProto.FLOAT, ["num_tokens", hidden]),
                helper.make_tensor_value_info(SAMPLED_ROWS, TensorProto.INT64, ["num_sampled"]),
            ],
            [
                helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["num_sampled", vocabulary]),
                helper.make_tensor_value_info(graph.residual, TensorProto.FLOAT, ["num_sampled", hidden]),
            ],
            [*initializers, *graph.constants.values()],
        )
        model = helper.make_model(
            lowered,
            opset_imports=[
                helper.make_opsetid("", graph.opset),
                helper.make_opsetid(DOMAIN, 1),
                helper.make_opsetid("com.microsoft", 1),
            ],
            ir_version=graph.ir_version,
        )
        return bytes(model.SerializeToString())

    def _kernels(self, graph: DecoderGraph) -> list[Any]:
        """What the graph needs compiled: seconds the first time, then read from numba's cache on disk."""
        found: dict[Any, None] = {}
        for op_type in sorted({node.op_type for node in graph.nodes if node.domain == DOMAIN}):
            if op_type in ROW_KERNELS:
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
        return self._table.add_node(
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
        extra[attention.STEP - first] = self.record.words.ctypes.data
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
        return self._table.add_node(
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
        attention.scratch_bytes(config.num_attention_heads, config.num_key_value_heads, value_dim),
    )
    return np.zeros((max_tasks, -(-size // 4096) * 4096), np.uint8)


def _load(name: str, stored: StoredWeight, checkpoint: Checkpoint) -> dict[str, npt.NDArray[Any]]:
    """Reads a weight into its form; a quantized one comes with its scales."""
    weight = checkpoint.read_weight(stored.weight, layer=stored.layer, next_layer=stored.next_layer)
    values = np.ascontiguousarray(weight, np.float32)
    match stored.form:
        case "plain":
            return {name: values}
        case "transposed":
            return {name: np.ascontiguousarray(values.T)}
        case _:
            quantized, scale = quantize_weight(values, stored.rotation)
            matrix = name.removesuffix(".scale")
            return {matrix: np.ascontiguousarray(quantized.T), f"{matrix}.scale": scale}
