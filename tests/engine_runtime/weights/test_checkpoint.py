"""What ``open_checkpoint`` accepts, refuses and reads."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine_runtime.models.build import build_segment
from engine_runtime.weights.checkpoint import open_checkpoint
from engine_runtime.weights.errors import CheckpointError
from tests.reference.tiny_checkpoints import tiny_weights, write_tiny_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint("llama", tmp_path / "model")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path, names: tuple[str, str] = ("model-1.safetensors", "model-2.safetensors")) -> None:
    """Replaces the single file by two and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: names[i % 2] for i, name in enumerate(weights)}
    for file in names:
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_reads_every_tensor(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    expected = tiny_weights("llama")
    assert set(checkpoint.names) == set(expected)
    for name in checkpoint.names:
        np.testing.assert_array_equal(checkpoint.read(name), expected[name])
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in expected.values())
    with pytest.raises(KeyError):
        checkpoint.read("model.layers.99.mlp.up_proj.weight")


def test_shards_are_one_checkpoint(folder: Path) -> None:
    whole = open_checkpoint(folder)
    expected = {name: whole.read(name).copy() for name in whole.names}
    whole.close()
    shard(folder)
    parts = open_checkpoint(folder)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(parts.read(name), tensor)
    assert parts.num_bytes == whole.num_bytes


def test_types_are_kept_as_stored(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    halves: dict[str, np.ndarray[Any, Any]] = {}
    for i, (name, tensor) in enumerate(weights.items()):
        halves[name] = tensor.astype(ml_dtypes.bfloat16 if i % 2 else np.float16)
    save_file(halves, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    for name, tensor in halves.items():
        assert checkpoint.read(name).dtype == tensor.dtype
        np.testing.assert_array_equal(checkpoint.read(name), tensor)


def test_tied_embeddings_read_as_the_head(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint("qwen3", tmp_path))
    assert "lm_head.weight" in checkpoint.names
    np.testing.assert_array_equal(
        checkpoint.read("lm_head.weight"), checkpoint.read("model.embed_tokens.weight")
    )


def test_gemma_norms_read_as_factors(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint("gemma3", tmp_path)
    stored = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tiny_weights("gemma3").items()}
    save_file(stored, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    norm = checkpoint.read("model.layers.1.self_attn.q_norm.weight")
    # 1 + w needs more than the eight bits of a bfloat16.
    assert norm.dtype == np.float32
    expected = 1 + stored["model.layers.1.self_attn.q_norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(norm, expected)
    assert checkpoint.read("model.layers.1.self_attn.q_proj.weight").dtype == ml_dtypes.bfloat16


def test_language_model_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint("gemma3", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    weights = tiny_weights("gemma3")
    stored = {name.replace("model.", "language_model.model.", 1): w for name, w in weights.items()}
    stored["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
    save_file(stored, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names) == {*weights, "lm_head.weight"}
    name = "model.layers.2.mlp.up_proj.weight"
    np.testing.assert_array_equal(checkpoint.read(name), weights[name])


def test_merged_weights_are_concatenated(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint("qwen2", tmp_path))
    weights = {weight.name: weight for weight in build_segment(checkpoint.config, "middle").weights}
    qkv = checkpoint.read_weight(weights["next_layer.self_attn.qkv_proj.weight"], layer=0, next_layer=1)
    parts = [checkpoint.read(f"model.layers.1.self_attn.{part}_proj.weight") for part in "qkv"]
    np.testing.assert_array_equal(qkv, np.concatenate(parts))
    bias = checkpoint.read_weight(weights["next_layer.self_attn.qkv_proj.bias"], layer=0, next_layer=1)
    assert bias.shape == weights["next_layer.self_attn.qkv_proj.bias"].shape
    down = checkpoint.read_weight(weights["layer.mlp.down_proj.weight"], layer=0, next_layer=1)
    np.testing.assert_array_equal(down, checkpoint.read("model.layers.0.mlp.down_proj.weight"))


def test_fingerprint_tells_weights_apart(folder: Path, tmp_path: Path) -> None:
    first = open_checkpoint(folder).fingerprint
    assert open_checkpoint(folder).fingerprint == first
    os.utime(folder / "model.safetensors", ns=(0, 1_000_000_000))
    touched = open_checkpoint(folder).fingerprint
    edit_config(folder, rms_norm_eps=1e-3)
    edited = open_checkpoint(folder).fingerprint
    other = open_checkpoint(write_tiny_checkpoint("qwen3", tmp_path / "other")).fingerprint
    assert len({first, touched, edited, other}) == 4


def test_missing_and_misshapen_tensors_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:-1].copy()}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"{name} has shape \[95, 64\]; the configuration says \[96, 64\]"
    ):
        open_checkpoint(folder)
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "shard_name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "model\\x.safetensors",
        "x\0.safetensors",
    ],
)
def test_shards_outside_the_folder_are_refused(shard_name: str, folder: Path) -> None:
    save_file({"x": np.ones(1, np.float32)}, folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": shard_name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is no file of its folder"):
        open_checkpoint(folder)


def test_links_may_lead_into_the_blobs_of_the_hub_cache_only(folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "models--x" / "blobs"
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (folder / "config.json").rename(snapshot / "config.json")
    (folder / "model.safetensors").rename(blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    open_checkpoint(snapshot)

    (tmp_path / "elsewhere.safetensors").symlink_to(blobs / "0123")
    (blobs / "0123").rename(tmp_path / "secret")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of the model's folder"):
        open_checkpoint(snapshot)


def test_pickles_are_refused_and_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    modules = set(sys.modules)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*never opened.*safetensors"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="is a Python pickle"):
        open_checkpoint(folder / "pytorch_model.bin")
    assert not any(name.startswith(("torch", "pickle")) for name in set(sys.modules) - modules)


def test_custom_code_is_refused_and_never_imported(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match="own Python code"):
        open_checkpoint(folder)
    assert "modeling_evil" not in sys.modules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no valid JSON"),
        ("[]", "holds no JSON object"),
        ("[" * 100_000, "no valid JSON"),
        (" " * (1 << 20) + "{}", "is larger than"),
        ('{"model_type": "bert"}', "'bert' is not supported"),
    ],
)
def test_bad_config_is_refused(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"x": 1}])
def test_bad_index_is_refused(weight_map: object, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="weight_map must map"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing; is the download complete"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shard(folder)
    weights = load_file(folder / "model-1.safetensors")
    weights |= load_file(folder / "model-2.safetensors")
    save_file(weights, folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="occurs twice"):
        open_checkpoint(folder)


def test_paths_that_are_no_model(tmp_path: Path, folder: Path) -> None:
    for path, message in [
        (tmp_path / "none", "does not exist"),
        (folder / "model.safetensors", "name the folder"),
        (folder / "config.json", "neither a folder in Hugging Face format nor a .gguf file"),
        (tmp_path, "holds no config.json"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(CheckpointError, match=r"name one of them, such as .*x\.gguf"):
        open_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        open_checkpoint(folder)
