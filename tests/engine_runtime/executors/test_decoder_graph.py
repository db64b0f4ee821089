from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from engine_runtime.executors.onnxruntime.decoder_graph import build_decoder, transpose_weights
from engine_runtime.weights.checkpoint import open_checkpoint
from tests.reference.tiny_checkpoints import CONFIGS, write_tiny_checkpoint


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_reads_every_tensor_of_the_checkpoint_but_the_embeddings(architecture: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint(architecture, tmp_path))
    graph = build_decoder(checkpoint.config)
    read = Counter(
        name
        for stored in graph.weights.values()
        for name in stored.weight.source_names(layer=stored.layer, next_layer=stored.next_layer)
    )
    expected = {name for name in checkpoint.names if name != "model.embed_tokens.weight"}
    assert set(read) == expected | {"lm_head.weight"}
    assert set(read.values()) == {1}


def test_transposed_weights_have_the_shape_that_the_product_needs(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint("llama", tmp_path))
    graph = build_decoder(checkpoint.config)
    transpose_weights(graph)
    assert not any(node.op_type in ("Transpose", "Identity") for node in graph.nodes)
    head = graph.weights["lm_head.weight"]
    assert (head.form, head.shape) == ("transposed", (64, 256))
    assert head.num_bytes == 4 * 64 * 256
    assert head.as_form("int8").num_bytes == 64 * 256
    assert head.as_form("scale").shape == (256,)
    assert graph.weights["norm.weight"].form == "plain"


def test_attention_nodes_stand_between_the_segments_of_their_layers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint("qwen3", tmp_path))
    graph = build_decoder(checkpoint.config)
    producers = graph.producers()
    attentions = [node for node in graph.nodes if node.op_type == "Attention"]
    assert [node.attribute[0].i for node in attentions] == list(range(checkpoint.config.num_hidden_layers))
    for layer, node in enumerate(attentions):
        assert f"model.layers.{layer}.self_attn" in producers[node.input[0]].name
