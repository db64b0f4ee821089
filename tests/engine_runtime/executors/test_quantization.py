from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine_runtime.executors.onnxruntime.decoder_graph import DecoderGraph, build_decoder, transpose_weights
from engine_runtime.executors.onnxruntime.decoder_session import DecoderSession
from engine_runtime.executors.onnxruntime.quantization import (
    fuse_quantized,
    quantize_matmuls,
    quantize_weight,
    rotation_of,
)
from engine_runtime.kernels.cpu import StepLayout, allocate_kv_cache
from engine_runtime.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engine_runtime.executors.test_row_kernels import rotate
from tests.reference.tiny_checkpoints import CONFIGS, write_tiny_checkpoint

_TOKENS = np.random.default_rng(0).integers(0, 256, 40)


def _graph(checkpoint: Checkpoint, *, quantized: bool, fused: bool = False) -> DecoderGraph:
    graph = build_decoder(checkpoint.config)
    transpose_weights(graph)
    if quantized:
        quantize_matmuls(graph)
    if fused:
        fuse_quantized(graph)
    return graph


def _logits(graph: DecoderGraph, checkpoint: Checkpoint) -> np.ndarray:
    config = graph.config
    cache = allocate_kv_cache(config.num_hidden_layers, 4, 16, config.num_key_value_heads, config.head_dim)
    session = DecoderSession(
        graph, checkpoint, cache, max_tokens=40, max_sampled=40, max_len=64, num_threads=2
    )
    embeddings = checkpoint.read("model.embed_tokens.weight").astype(np.float32)
    session.hidden[:] = embeddings[_TOKENS] * np.float32(config.embedding_scale)
    layout = StepLayout(np.array([0, 40]), np.array([40]), np.array([[2, 0, 3]]))
    session.record.fill(layout, 40)
    session.run(np.arange(40))
    session.close()
    return session.logits


@pytest.mark.parametrize(
    ("columns", "rotation"), [(64, 64), (96, 32), (576, 64), (1536, 512), (4096, 512), (48, 16)]
)
def test_rotation_is_the_largest_power_of_two_that_divides(columns: int, rotation: int) -> None:
    assert rotation_of(columns) == rotation


@pytest.mark.parametrize("columns", [64, 96])
def test_quantized_weight_times_rotated_row_is_the_product(columns: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((48, columns)).astype(np.float32)
    x = rng.standard_normal((3, columns)).astype(np.float32)
    rotation = rotation_of(columns)
    q, scale = quantize_weight(weight, rotation)
    assert (q.dtype, np.abs(q.astype(int)).max()) == (np.dtype(np.int8), 127)
    product = rotate(x, rotation) @ (q * scale[:, None].astype(np.float64)).T
    error = np.linalg.norm(product - x @ weight.T) / np.linalg.norm(x @ weight.T)
    assert error < 0.02


def test_channel_of_zeros() -> None:
    q, scale = quantize_weight(np.zeros((2, 32), np.float32), 32)
    assert not q.any()
    assert not scale.any()


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_quantized_decoders_stay_close_to_float32(architecture: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint(architecture, tmp_path))
    exact = _logits(_graph(checkpoint, quantized=False), checkpoint)
    plain = _logits(_graph(checkpoint, quantized=True), checkpoint)
    fused = _logits(_graph(checkpoint, quantized=True, fused=True), checkpoint)
    spread = exact.std()
    # 8 bits leave about 1 % in each of the products; these models are three layers deep.
    assert np.abs(plain - exact).std() < 0.05 * spread
    assert np.abs(fused - exact).std() < 0.05 * spread
    # Fusing changes the order of additions, and a rounding in one place may then fall the other way.
    assert np.abs(fused - plain).std() < 0.02 * spread


def test_llama_fuses_to_four_products_and_four_operators_a_layer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint("llama", tmp_path))
    layers = checkpoint.config.num_hidden_layers
    graph = _graph(checkpoint, quantized=True, fused=True)
    assert Counter(node.op_type for node in graph.nodes) == {
        "MatMulInteger": 4 * layers + 1,
        "AddRmsNormQuantize": 2 * layers,
        "SwigluQuantize": layers,
        "AttentionFromSumsToRows": layers - 1,
        # The ends: the first norm has no product before it, the last attention is cut to the sampled rows.
        "RMSNormalization": 1,
        "QuantizeRows": 2,
        "AttentionFromSums": 1,
        "Gather": 2,
        "Dequantize": 1,
    }


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_all_products_are_quantized_and_each_reads_its_own_weight(architecture: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint(architecture, tmp_path))
    graph = _graph(checkpoint, quantized=True, fused=True)
    products = [node for node in graph.nodes if node.op_type == "MatMulInteger"]
    assert not any(node.op_type == "MatMul" for node in graph.nodes)
    assert len({node.input[1] for node in products}) == 4 * checkpoint.config.num_hidden_layers + 1
    assert {graph.weights[node.input[1]].form for node in products} == {"int8"}


def test_passes_leave_every_value_with_one_producer_before_its_consumers(tmp_path: Path) -> None:
    for architecture in CONFIGS:
        checkpoint = open_checkpoint(write_tiny_checkpoint(architecture, tmp_path / architecture))
        for quantized, fused in ((False, False), (True, False), (True, True)):
            graph = _graph(checkpoint, quantized=quantized, fused=fused)
            known = {"hidden", "sampled_rows", "", *graph.weights, *graph.constants}
            for node in graph.nodes:
                assert set(node.input) <= known, node.name
                assert not known.intersection(node.output), node.name
                known.update(node.output)
            assert "logits" in known
            used = {name for node in graph.nodes for name in node.input}
            assert set(graph.weights) <= used
