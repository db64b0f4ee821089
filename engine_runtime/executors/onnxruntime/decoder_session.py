"""The decoder's graph compiled to sessions of ONNX Runtime, with its weights.

One session has products of our own, over weights packed by us, and computes steps up to a number of tokens.
Another one, for larger steps if there are any, multiplies with ONNX Runtime's product and reads the weights
as that packs them. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from engine_runtime.executors.onnxruntime.decoder_graph import (
    HIDDEN,
    LAST_NORM,
    LOGITS,
    SAMPLED_ROWS,
    DecoderGraph,
    StoredWeight,
)
from engine_runtime.executors.onnxruntime.node_states import OPERATORS, NodeStates
from engine_runtime.executors.onnxruntime.operators import DOMAIN, compiled
from engine_runtime.executors.onnxruntime.ort_session import OrtSession, external_initializer, packs_matrices
from engine_runtime.executors.onnxruntime.packed_nodes import PackedNodes, packed_nodes
from engine_runtime.executors.onnxruntime.packed_weights import PackedWeights, matrices_of
from engine_runtime.executors.onnxruntime.quantization import quantize_weight
from engine_runtime.executors.onnxruntime.step_record import TOKENS, StepRecord
from engine_runtime.kernels.cpu import KvCache
from engine_runtime.weights.checkpoint import Checkpoint


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
        max_packed: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
        profile_prefix: Path | None = None,
    ) -> None:
        """Reads the weights and compiles the graph.

        Args:
            max_tokens, max_sampled: largest step.
            max_len: positions that the rotary tables cover.
            max_packed: steps of so many tokens at most read weights that are packed for our own products; 0
            packs none, which is needed where ``packed_bytes`` of the graph is 0, and ``max_tokens`` all.
            progress: called with (what is being done, how much is done, how much there is).

        Raises:
            CheckpointError: a tensor cannot be read.
            OnnxRuntimeError: the graph is refused.
        """
        config = graph.config
        self._config = config
        self.record = StepRecord(
            num_threads, config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        )
        self._states = NodeStates(config, cache, self.record, max_tokens=max_tokens, max_len=max_len)
        self.hidden = np.empty((max_tokens, config.hidden_size), np.float32)
        self.logits = np.empty((max_sampled, config.vocab_size), np.float32)
        self._residual = np.empty((max_sampled, config.hidden_size), np.float32)
        self._residual_name = graph.residual
        self._num_threads = num_threads
        self._profile_prefix = profile_prefix

        report = progress or (lambda what, done, total: None)
        products = packed_nodes(graph) if max_packed else None
        plain = graph.nodes if max_packed < max_tokens else []
        kernels = self._states.kernels([*plain, *(products.nodes if products else [])])
        for i, kernel in enumerate(kernels):
            report("kernels", i, len(kernels))
            compiled(kernel)
        report("kernels", len(kernels), len(kernels))
        weights: dict[str, npt.NDArray[Any]] = {}
        packed = _Packed(PackedWeights(matrices_of(graph)), products) if products else None
        # Scales are inputs of the graph too, but come with their matrices.
        wanted = [(name, stored) for name, stored in graph.weights.items() if stored.form != "scale"]
        with ThreadPoolExecutor(num_threads) as threads:
            loaded = threads.map(
                lambda item: _load(item[0], item[1], checkpoint, packed, is_plain=bool(plain)), wanted
            )
            for i, arrays in enumerate(loaded):
                weights.update(arrays)
                report("weights", i + 1, len(wanted))
        vectors = {name: array for name, array in weights.items() if array.ndim < 2}
        self._sessions: list[_Compiled] = []
        if packed is not None:
            nodes = self._states.nodes(graph, packed.products.nodes, packed.weights)
            self._sessions.append(_Compiled(self._compile(graph, nodes, vectors), max_packed))
        if plain:
            nodes = self._states.nodes(graph, plain)
            self._sessions.append(_Compiled(self._compile(graph, nodes, weights), max_tokens))
        self._kept = vectors if packs_matrices() else weights, packed  # read in place
        self._last_norm: npt.NDArray[np.float32] = weights[LAST_NORM]

    def run(self, sampled_rows: npt.NDArray[np.int64]) -> None:
        """Computes a step that ``record`` describes and whose embeddings are in ``hidden``.

        Args:
            sampled_rows: [R], rows of the step whose logits are wanted; ``logits[:R]`` receives them.

        Raises:
            OnnxRuntimeError: an operator failed.
        """
        num_tokens, num_sampled = int(self.record.words[TOKENS]), len(sampled_rows)
        compiled_graph = next(c for c in self._sessions if num_tokens <= c.max_tokens)
        session = compiled_graph.session
        if compiled_graph.bound != (num_tokens, num_sampled):
            session.bind_input(HIDDEN, self.hidden[:num_tokens])
            session.bind_output(LOGITS, self.logits[:num_sampled])
            session.bind_output(self._residual_name, self._residual[:num_sampled])
            compiled_graph.bound = (num_tokens, num_sampled)
        session.bind_input(SAMPLED_ROWS, sampled_rows)
        session.run()

    def final_hidden(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """The final hidden states [N, H] of rows of ``logits``, normalized as the last product reads them."""
        rows = self._residual[start:stop]
        mean_square = np.mean(np.square(rows), axis=-1, keepdims=True)
        factor: npt.NDArray[np.float32] = 1 / np.sqrt(mean_square + np.float32(self._config.rms_norm_eps))
        return rows * factor * self._last_norm

    def close(self) -> None:
        for compiled_graph in self._sessions:
            compiled_graph.session.close()

    def _compile(
        self, graph: DecoderGraph, nodes: list[onnx.NodeProto], weights: dict[str, npt.NDArray[Any]]
    ) -> OrtSession:
        """A session of these nodes. Initializers that they do not read are left out."""
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
            [
                *(external_initializer(name, array.dtype, array.shape) for name, array in weights.items()),
                *graph.constants.values(),
            ],
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
        used = {node.op_type for node in nodes if node.domain == DOMAIN}
        return OrtSession(
            model.SerializeToString(),
            weights,
            [self._states.table.build(OPERATORS[name]) for name in sorted(used)],
            DOMAIN,
            num_threads=self._num_threads,
            profile_prefix=self._profile_prefix,
        )


@dataclass
class _Compiled:
    """A session, the largest step for it, and the step that its buffers are bound for: (tokens, sampled
    rows)."""

    session: OrtSession
    max_tokens: int
    bound: tuple[int, int] = (-1, -1)


@dataclass(frozen=True)
class _Packed:
    weights: PackedWeights
    products: PackedNodes


def _load(
    name: str, stored: StoredWeight, checkpoint: Checkpoint, packed: _Packed | None, *, is_plain: bool
) -> dict[str, npt.NDArray[Any]]:
    """Reads a weight into its form; a quantized one comes with its scales, packed, ``is_plain``, or both."""
    weight = checkpoint.read_weight(stored.weight, layer=stored.layer, next_layer=stored.next_layer)
    values = np.ascontiguousarray(weight, np.float32)
    match stored.form:
        case "plain":
            return {name: values}
        case "transposed":
            return {name: np.ascontiguousarray(values.T)}
        case _:
            quantized, scale = quantize_weight(values, stored.rotation)
            if packed is not None:
                packed.weights.pack(name, quantized, is_gated=name in packed.products.gated)
            result = {f"{name}.scale": scale}
            if is_plain:
                result[name] = np.ascontiguousarray(quantized.T)
            return result
