"""GGUF files hold the same model as the folders they were made from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from engine_runtime.rope import FrequencyFactors, inverse_frequencies
from engine_runtime.weights.checkpoint import open_checkpoint
from engine_runtime.weights.errors import CheckpointError
from engine_runtime.weights.gguf_tensors import dequantize_blocks
from tests.reference.dense_decoder import DenseDecoder
from tests.reference.recordings import load_recordings
from tests.reference.tiny_checkpoints import write_tiny_checkpoint
from tests.reference.tiny_gguf import GGUF_ARCHITECTURES, write_tiny_gguf

Type = gguf.GGMLQuantizationType


@pytest.mark.parametrize("architecture", sorted({*GGUF_ARCHITECTURES} - {"gemma3"}))
def test_same_tensors_and_answers_as_the_folder(architecture: str, tmp_path: Path) -> None:
    folder = open_checkpoint(write_tiny_checkpoint(architecture, tmp_path / "folder"))
    file = open_checkpoint(write_tiny_gguf(architecture, tmp_path / "tiny.gguf"))
    assert file.names == folder.names
    for name in folder.names:
        np.testing.assert_array_equal(file.read(name), folder.read(name), err_msg=name)
    assert [layer.sliding_window for layer in file.config.layers] == (
        [None] * 3 if architecture == "qwen2" else [layer.sliding_window for layer in folder.config.layers]
    )
    for ours, theirs in zip(file.config.layers, folder.config.layers, strict=True):
        np.testing.assert_allclose(
            inverse_frequencies(ours.rope, file.config.head_dim),
            inverse_frequencies(theirs.rope, file.config.head_dim),
            rtol=1e-6,
        )


def test_gemma3_norms_are_stored_as_factors(tmp_path: Path) -> None:
    folder = open_checkpoint(write_tiny_checkpoint("gemma3", tmp_path / "folder"))
    # The format has no list of layer kinds: this pattern is that of the tiny checkpoint.
    file = open_checkpoint(write_tiny_gguf("gemma3", tmp_path / "tiny.gguf"))
    for name in folder.names:
        np.testing.assert_array_equal(file.read(name), folder.read(name), err_msg=name)
    assert [layer.sliding_window for layer in file.config.layers] == [10, 10, None, 10]
    for ours, theirs in zip(file.config.layers, folder.config.layers, strict=True):
        assert ours.rope == theirs.rope
    # query_pre_attn_scalar is not stored; that of the tiny checkpoint is not the head's size.
    assert file.config.attention_scale == 32**-0.5


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_generates_what_transformers_generates_from_the_folder(architecture: str, tmp_path: Path) -> None:
    decoder = DenseDecoder(open_checkpoint(write_tiny_gguf(architecture, tmp_path / "tiny.gguf")))
    for recording in load_recordings(architecture):
        tokens = (*recording.prompt_token_ids, *recording.token_ids[:-1])
        logits = decoder.logits(tokens, len(recording.token_ids))
        recording.check_tokens(logits.argmax(axis=-1).tolist(), tolerance=1e-4)


def test_llama3_scaling_is_read_from_its_tensor(tmp_path: Path) -> None:
    config = open_checkpoint(write_tiny_gguf("llama", tmp_path / "tiny.gguf")).config
    scaling = config.layers[0].rope.scaling
    assert isinstance(scaling, FrequencyFactors)
    assert scaling.factors[0] == 1.0
    assert scaling.factors[-1] == 8.0


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantized_matrices_read_as_the_gguf_package_reads_them(name: str, tmp_path: Path) -> None:
    path = write_tiny_gguf("qwen2", tmp_path / "tiny.gguf", Type[name])
    checkpoint = open_checkpoint(path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    embedding = tensors["token_embd.weight"]
    expected = gguf.dequantize(embedding.data, embedding.tensor_type)
    values = checkpoint.read("model.embed_tokens.weight")
    assert values.dtype.name == {"BF16": "bfloat16", "F16": "float16"}.get(name, "float32")
    np.testing.assert_array_equal(values.astype(np.float32), expected.reshape(values.shape))


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_dequantized_block_by_block(name: str) -> None:
    """The package cannot quantize these; random blocks do."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[Type[name]]
    random = np.random.RandomState(1)
    num_blocks = 3 * (1 << 16) // block_size + 5
    blocks = random.randint(0, 120, size=(num_blocks, block_bytes)).astype(np.uint8)
    expected = gguf.dequantize(blocks, Type[name])
    np.testing.assert_array_equal(dequantize_blocks(blocks.ravel(), Type[name]), expected.ravel())


def test_unsupported_types_are_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_gguf("qwen3", tmp_path / "tiny.gguf", Type.Q8_0)
    data = bytearray(path.read_bytes())
    start = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight")
    data[start + 20 : start + 24] = int(Type.IQ4_NL).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.weight has type IQ4_NL.*Q4_1, Q5_0"):
        open_checkpoint(path)


def test_parts_of_a_split_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="llama-gguf-split --merge"):
        open_checkpoint(path)


def test_default_model_has_the_known_shape(smollm2_path: Path) -> None:
    config = open_checkpoint(smollm2_path).config
    assert (config.architecture, config.num_hidden_layers, config.vocab_size) == ("llama", 30, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.tie_word_embeddings, config.max_position_embeddings) == (True, 8192)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)
