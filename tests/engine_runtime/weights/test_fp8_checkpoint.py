"""Checkpoints whose projections are stored in 8-bit floats, in the formats that others write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from engine_runtime.factory import RuntimeConfig, create_executor
from engine_runtime.weights.checkpoint import open_checkpoint
from engine_runtime.weights.errors import CheckpointError
from tests.engine_runtime.executors.generation import generate, tokens
from tests.reference.tiny_checkpoints import CONFIGS, tiny_prompts, tiny_weights

Array = npt.NDArray[Any]
Format = Literal["compressed-tensors", "modelopt", "old modelopt", "fp8"]

_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
_COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _WEIGHTS,
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}
_CONFIGS: dict[Format, dict[str, Any]] = {
    "compressed-tensors": _COMPRESSED,
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
    "old modelopt": {},
    "fp8": {"quant_method": "fp8", "activation_scheme": "static"},
}


def _decode_e4m3(bits: int) -> float:
    """The number that eight bits stand for (OCP 8-bit floating point, E4M3)."""
    sign = -1.0 if bits & 0x80 else 1.0
    exponent, fraction = bits >> 3 & 0xF, bits & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


_DECODED = np.array([_decode_e4m3(bits) for bits in range(256)], np.float32)


def write_fp8_checkpoint(folder: Path, form: Format) -> dict[str, Array]:
    """Writes the tiny llama with projections in FP8; returns the weights that it stands for."""
    folder.mkdir()
    config: dict[str, Any] = dict(CONFIGS["llama"])
    if form == "old modelopt":
        quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
        description = {"producer": {"name": "modelopt"}, "quantization": quantization}
        (folder / "hf_quant_config.json").write_text(json.dumps(description))
    else:
        config["quantization_config"] = _CONFIGS[form]
    (folder / "config.json").write_text(json.dumps(config))
    stored: dict[str, Array] = {}
    exact: dict[str, Array] = {}
    for name, weight in tiny_weights("llama").items():
        stored[name] = exact[name] = weight
        if not name.endswith("_proj.weight"):
            continue
        largest = np.abs(weight).max(axis=1, keepdims=True)
        if form == "compressed-tensors":
            scales: Array = (largest / 448).astype(ml_dtypes.bfloat16)  # [rows, 1]
        else:
            scales = np.full(() if "modelopt" in form else (1,), largest.max() / 448, np.float32)
            stored[name.replace(".weight", ".input_scale")] = np.array(0.02, np.float32)
        stored[f"{name}_scale"] = scales
        stored[name] = (weight / scales.astype(np.float32)).astype(ml_dtypes.float8_e4m3fn)
        exact[name] = _DECODED[stored[name].view(np.uint8)] * scales.astype(np.float32)
    if form == "modelopt":
        stored["model.layers.0.self_attn.k_proj.k_scale"] = np.array(1.5, np.float32)
    save_file(stored, folder / "model.safetensors")
    return exact


@pytest.mark.parametrize("form", sorted(_CONFIGS))
def test_every_format_reads_as_what_it_stands_for(form: Format, tmp_path: Path) -> None:
    exact = write_fp8_checkpoint(tmp_path / "model", form)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.holds_fp8
    assert set(checkpoint.names) == set(exact)
    for name, weight in exact.items():
        found = checkpoint.read(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, weight)
        assert checkpoint.is_fp8(name) == name.endswith("_proj.weight")
    name = "model.layers.2.mlp.down_proj.weight"
    fp8 = checkpoint.read_fp8(name)
    assert fp8.values.dtype == ml_dtypes.float8_e4m3fn
    assert fp8.scales.shape == (64,)
    np.testing.assert_array_equal(_DECODED[fp8.values.view(np.uint8)] * fp8.scales[:, None], exact[name])


def test_a_cpu_computes_it(tmp_path: Path) -> None:
    exact = write_fp8_checkpoint(tmp_path / "fp8", "compressed-tensors")
    dequantized = tmp_path / "exact"
    dequantized.mkdir()
    (dequantized / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    save_file(exact, dequantized / "model.safetensors")
    found = []
    for path in (tmp_path / "fp8", dequantized):
        executor, _ = create_executor(RuntimeConfig(path, dtype="float32", max_num_batched_tokens=64))
        found.append(tokens(generate(executor, tiny_prompts(), 12)[0]))
        executor.shutdown()
    assert found[0] == found[1]


def _edit(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": change}))


def _group(**changes: Any) -> dict[str, Any]:
    return _COMPRESSED | {"config_groups": {"group_0": {"weights": _WEIGHTS | changes}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantized with awq"),
        ({"bits": 4}, "an unnamed method"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, NVFP4"),
        ({"quant_algo": "W4A16_AWQ"}, "modelopt, W4A16_AWQ"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "a factor for each block"),
        (_COMPRESSED | {"format": "pack-quantized"}, "compressed-tensors, pack-quantized"),
        (_COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse in the format"),
        (_COMPRESSED | {"config_groups": 3}, "config_groups is 3; expected an object"),
        (_group(type="int"), "weights of type int with 8 bits"),
        (_group(num_bits=4), "weights of type float with 4 bits"),
        (_group(strategy="block"), "a factor for each block"),
    ],
)
def test_other_quantizations_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_fp8_checkpoint(tmp_path / "model", "compressed-tensors")
    _edit(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / "model")
    assert "supported are FP8" in str(caught.value) or "expected" in str(caught.value)


def test_modelopts_own_file_is_read(tmp_path: Path) -> None:
    write_fp8_checkpoint(tmp_path / "model", "old modelopt")
    path = tmp_path / "model" / "hf_quant_config.json"
    path.write_text(path.read_text().replace('"quant_algo": "FP8"', '"quant_algo": "NVFP4"'))
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json.*NVFP4"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, "weight_scale is missing"),
        (np.ones((2, 2), np.float32), r"shape \[2, 2\]"),
        (np.full((64, 1), np.nan, np.float32), "something else than finite numbers"),
    ],
)
def test_factors_are_checked(scales: Array | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    exact = write_fp8_checkpoint(folder, "compressed-tensors")
    name = "model.layers.0.mlp.down_proj.weight"
    stored = dict(exact)
    stored[name] = exact[name].astype(ml_dtypes.float8_e4m3fn)
    if scales is not None:
        stored[f"{name}_scale"] = scales
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder).read(name)
