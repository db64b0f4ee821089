"""How much worse a model predicts text in int8 than in float32: ``python -m tests.benchmarks.perplexity
[MODEL]``.

The text is ours: plain English prose, dialogue, questions and a little Python, about 3,700 tokens, in windows
of 512. Each candidate for the matrix products of the CPU executor runs through the same graph and the same
attention.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper

from engine_runtime.executors.onnxruntime.cpu_limits import usable_cores
from engine_runtime.executors.onnxruntime.decoder_graph import DecoderGraph, build_decoder, transpose_weights
from engine_runtime.executors.onnxruntime.decoder_session import DecoderSession
from engine_runtime.executors.onnxruntime.embedding import EmbeddingTable
from engine_runtime.executors.onnxruntime.quantization import fuse_quantized, quantize_matmuls
from engine_runtime.kernels.cpu import StepLayout, allocate_kv_cache
from engine_runtime.weights.checkpoint import Checkpoint, open_checkpoint
from server.model_source import fetch_default_model
from server.tokenizer import load_tokenizer

_TEXT = Path(__file__).with_name("perplexity_text.txt")
_WINDOW = 512
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


_CANDIDATES: dict[str, Callable[[DecoderGraph, Checkpoint], None]] = {
    "float32": lambda graph, checkpoint: None,
    "W8A8, rotated (the executor's int8)": _w8a8,
    "W8A8, not rotated": _w8a8_not_rotated,
    "MatMulNBits, 8 bits": _matmul_nbits(8),
    "MatMulNBits, 4 bits": _matmul_nbits(4),
}


def negative_log_likelihoods(
    session: DecoderSession, embedding: EmbeddingTable, token_ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Nats of each token but the first of each window, given those before it in the window."""
    blocks = np.arange(_WINDOW // 16, dtype=np.int32)[None]
    losses = []
    for first in range(0, len(token_ids) - 1, _WINDOW):
        window = token_ids[first : first + _WINDOW + 1]
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
    options = parser.parse_args()
    path = options.model or fetch_default_model()
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    text = _TEXT.read_text()
    token_ids = np.array(load_tokenizer(path).encode(text, add_special_tokens=False))
    table = np.asarray(checkpoint.read("model.embed_tokens.weight"), np.float32)
    print(f"{len(token_ids)} tokens\n")
    print("| matrix products | perplexity | to float32 | standard error | seconds |")
    print("|---|---|---|---|---|")
    exact: npt.NDArray[np.float64] | None = None
    for name, lower in _CANDIDATES.items():
        graph = build_decoder(config)
        transpose_weights(graph)
        lower(graph, checkpoint)
        is_exact = exact is None
        cache = allocate_kv_cache(
            config.num_hidden_layers,
            _WINDOW // 16,
            16,
            config.num_key_value_heads,
            config.head_dim,
            "float32" if is_exact else options.kv,
        )
        session = DecoderSession(
            graph, checkpoint, cache,
            max_tokens=_ROWS, max_sampled=_ROWS, max_len=_WINDOW, num_threads=options.threads,
        )  # fmt: skip
        embedding = EmbeddingTable(table, config.embedding_scale, is_quantized=not is_exact)
        start = time.perf_counter()
        losses = negative_log_likelihoods(session, embedding, token_ids)
        seconds = time.perf_counter() - start
        session.close()
        if exact is None:
            exact = losses
        difference = losses - exact
        error = difference.std() / np.sqrt(len(difference))
        print(
            f"| {name} | {np.exp(losses.mean()):.4f} | {np.expm1(difference.mean()):+.2%} | {error:.2%} "
            f"| {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
