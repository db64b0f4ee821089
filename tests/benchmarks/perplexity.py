"""How much worse a model predicts text in int8 than in float32: ``python -m tests.benchmarks.perplexity
[MODEL]``.

Each candidate for the matrix products of the CPU executor runs through the same graph and the same attention.
``gpu_perplexity`` does the same for a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from engine_runtime.executors.onnxruntime.cpu_limits import usable_cores
from engine_runtime.executors.onnxruntime.decoder_graph import (
    LOGITS,
    DecoderGraph,
    build_decoder,
    transpose_weights,
)
from engine_runtime.executors.onnxruntime.decoder_session import DecoderSession
from engine_runtime.executors.onnxruntime.embedding import EmbeddingTable
from engine_runtime.executors.onnxruntime.quantization import fuse_quantized, quantize_matmuls
from engine_runtime.kernels.cpu import StepLayout, allocate_kv_cache
from engine_runtime.weights.checkpoint import Checkpoint, open_checkpoint
from server.model_source import fetch_default_model
from tests.benchmarks.perplexity_table import PerplexityTable
from tests.benchmarks.perplexity_text import WINDOW, text_windows

_ROWS = 128


def _w8a8(graph: DecoderGraph, checkpoint: Checkpoint) -> None:
    quantize_matmuls(graph)
    fuse_quantized(graph)


def _w8a8_not_rotated(graph: DecoderGraph, checkpoint: Checkpoint) -> None:
    quantize_matmuls(graph, largest_rotation=1)
    fuse_quantized(graph)


def _matmul_nbits(bits: int) -> Callable[[DecoderGraph, Checkpoint], None]:
    """MatMulNBits with blocks of 32 and 8-bit arithmetic: ONNX Runtime's own way."""

    def lower(graph: DecoderGraph, checkpoint: Checkpoint) -> None:
        for node in graph.nodes:
            if node.op_type != "MatMul":
                continue
            name = node.input[1]
            stored = graph.weights.pop(name)
            weight = checkpoint.read_weight(stored.weight, layer=stored.layer, next_layer=stored.next_layer)
            packed, scales = _blocks(np.asarray(weight, np.float32), bits)
            for suffix, array in (("packed", packed), ("scales", scales)):
                graph.constants[f"{name}.{suffix}"] = numpy_helper.from_array(array, f"{name}.{suffix}")
            outputs, columns = weight.shape
            attributes = {"K": columns, "N": outputs, "bits": bits, "block_size": 32, "accuracy_level": 4}
            node.CopyFrom(
                helper.make_node(
                    "MatMulNBits",
                    [node.input[0], f"{name}.packed", f"{name}.scales"],
                    list(node.output),
                    name=node.name,
                    domain="com.microsoft",
                    **attributes,
                )
            )

    return lower


def _blocks(
    weight: npt.NDArray[np.float32], bits: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Symmetric quantization in blocks of 32, as MatMulNBits stores it."""
    zero = 1 << (bits - 1)
    blocks = weight.reshape(len(weight), -1, 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)
    scales = np.where(extreme == 0, np.float32(1.0), extreme / np.float32(-zero))
    q = np.clip(np.rint(blocks / scales) + zero, 0, 2 * zero - 1).astype(np.uint8)
    packed = q if bits == 8 else q[..., 0::2] | (q[..., 1::2] << 4)
    return packed, scales[..., 0].reshape(len(weight), -1)


def _e4m3(*, with_logits: bool) -> Callable[[DecoderGraph, Checkpoint], None]:
    """8-bit floats with a factor for each row of W and for each token, computed exactly otherwise."""

    def lower(graph: DecoderGraph, checkpoint: Checkpoint) -> None:
        nodes: list[onnx.NodeProto] = []
        values = {
            "e4m3.largest": np.array(448, np.float32),
            "e4m3.least": np.array(1e-12, np.float32),
            "e4m3.axes": np.array([-1], np.int64),
        }
        for name, value in values.items():
            graph.constants[name] = numpy_helper.from_array(value, name)
        for node in graph.nodes:
            if node.op_type == "MatMul" and (with_logits or node.output[0] != LOGITS):
                x, name = node.input[0], node.input[1]
                stored = graph.weights.pop(name)
                weight = checkpoint.read_weight(
                    stored.weight, layer=stored.layer, next_layer=stored.next_layer
                )
                weight = np.ascontiguousarray(_rounded_rows(np.asarray(weight, np.float32)).T)
                graph.constants[name] = numpy_helper.from_array(weight, name)
                nodes += _rounding_nodes(x, node.name)
                node.input[0] = f"{node.name}/rounded"
            nodes.append(node)
        graph.nodes = nodes

    return lower


def _rounded_rows(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    scales = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / np.float32(448), np.float32(1e-12))
    rounded: npt.NDArray[np.float32] = (weight / scales).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return rounded * scales


def _rounding_nodes(x: str, path: str) -> list[onnx.NodeProto]:
    """x as E4M3 with a factor for each row, multiplied out again."""
    node = helper.make_node
    names = [f"{path}/{name}" for name in ("abs", "max", "scale", "least", "scaled", "e4m3", "wide")]
    absolute, largest, scale, least, scaled, narrow, wide = names
    return [
        node("Abs", [x], [absolute], name=absolute),
        node("ReduceMax", [absolute, "e4m3.axes"], [largest], name=largest, keepdims=1),
        node("Div", [largest, "e4m3.largest"], [scale], name=scale),
        node("Max", [scale, "e4m3.least"], [least], name=least),
        node("Div", [x, least], [scaled], name=scaled),
        node("Cast", [scaled], [narrow], name=narrow, to=onnx.TensorProto.FLOAT8E4M3FN),
        node("Cast", [narrow], [wide], name=wide, to=onnx.TensorProto.FLOAT),
        node("Mul", [wide, least], [f"{path}/rounded"], name=f"{path}/rounded"),
    ]


_CANDIDATES: dict[str, Callable[[DecoderGraph, Checkpoint], None]] = {
    "float32": lambda graph, checkpoint: None,
    "W8A8, rotated (the executor's int8)": _w8a8,
    "E4M3 (a GPU's fp8)": _e4m3(with_logits=False),
    "E4M3, output projection too": _e4m3(with_logits=True),
    "W8A8, not rotated": _w8a8_not_rotated,
    "MatMulNBits, 8 bits": _matmul_nbits(8),
    "MatMulNBits, 4 bits": _matmul_nbits(4),
}


def negative_log_likelihoods(
    session: DecoderSession, embedding: EmbeddingTable, windows: Sequence[npt.NDArray[np.int64]]
) -> npt.NDArray[np.float64]:
    """Nats of each token but the first of each window, given those before it in the window."""
    blocks = np.arange(WINDOW // 16, dtype=np.int32)[None]
    losses = []
    for window in windows:
        for start in range(0, len(window) - 1, _ROWS):
            inputs, targets = window[start : start + _ROWS], window[start + 1 : start + _ROWS + 1]
            inputs = inputs[: len(targets)]
            count = len(inputs)
            embedding.look_up(inputs.astype(np.int32), session.hidden)
            session.record.fill(StepLayout(np.array([0, count]), np.array([start + count]), blocks), count)
            session.run(np.arange(count))
            logits = session.logits[:count].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            losses.append(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(count), targets])
    return np.concatenate(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument(
        "--kv", default="float16", choices=("float16", "float32"), help="cache of all but float32"
    )
    parser.add_argument("--only", nargs="*", help="beside float32, what has one of these in its name")
    options = parser.parse_args()
    path = options.model or fetch_default_model()
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    windows = [np.array(window) for window in text_windows(path)]
    table = np.asarray(checkpoint.read("model.embed_tokens.weight"), np.float32)
    rows = PerplexityTable(windows, "matrix products", "float32")
    for name, lower in _CANDIDATES.items():
        if options.only and not any(part in name for part in ("float32", *options.only)):
            continue
        graph = build_decoder(config)
        transpose_weights(graph)
        lower(graph, checkpoint)
        is_exact = rows.is_empty
        cache = allocate_kv_cache(
            config.num_hidden_layers,
            WINDOW // 16,
            16,
            config.num_key_value_heads,
            config.head_dim,
            "float32" if is_exact else options.kv,
        )
        session = DecoderSession(
            graph, checkpoint, cache,
            max_tokens=_ROWS, max_sampled=_ROWS, max_len=WINDOW, num_threads=options.threads,
        )  # fmt: skip
        embedding = EmbeddingTable(table, config.embedding_scale, is_quantized=not is_exact)
        start = time.perf_counter()
        losses = negative_log_likelihoods(session, embedding, windows)
        seconds = time.perf_counter() - start
        session.close()
        rows.add(name, losses, seconds)


if __name__ == "__main__":
    main()
