"""A folder in Hugging Face format: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine_runtime.model_config import ConfigError, ModelConfig
from engine_runtime.weights.config_fields import ConfigFields
from engine_runtime.weights.errors import CheckpointError
from engine_runtime.weights.expected_tensors import is_norm
from engine_runtime.weights.file_tensor import FileTensor
from engine_runtime.weights.fp8_tensor import Fp8Tensor, is_scale_shape
from engine_runtime.weights.hf_config import read_hf_config
from engine_runtime.weights.quantization_config import check_modelopt
from engine_runtime.weights.safetensors_file import SafetensorsFile

_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_MODELOPT_CONFIG = "hf_quant_config.json"
_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 16 << 20

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Where multimodal checkpoints keep the language model.
_LANGUAGE_MODEL_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


class HfFolder:
    """The tensors of the folder; implements ``TensorSource``.

    Norm weights of Gemma are stored as the difference to 1; they are read as the factor itself, in float32.
    A matrix in E4M3 has its factors beside it, as NAME_scale: one, or one for each row.

    Raises:
        CheckpointError: a file is missing, broken, or outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = _read_json(folder / _CONFIG, _MAX_CONFIG_BYTES)
        generation = folder / _GENERATION_CONFIG
        generation_config = _read_json(generation, _MAX_CONFIG_BYTES) if generation.exists() else {}
        try:
            self.config: ModelConfig = read_hf_config(config, generation_config)
        except ConfigError as error:
            raise CheckpointError(f"{folder / _CONFIG}: {error}") from error
        self._check_modelopt()

        self._files: list[SafetensorsFile] = []
        self._file_of: dict[str, tuple[SafetensorsFile, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for path in self._weight_files():
            file = SafetensorsFile(path)
            self._files.append(file)
            stat = path.stat()
            digest.update(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}:".encode() + file.header_digest)
            for stored_name, shape in file.shapes.items():
                name = _canonical(stored_name)
                if name in self.shapes:
                    raise CheckpointError(f"{folder}: tensor {name} occurs twice")
                self._file_of[name] = (file, stored_name)
                self.shapes[name] = shape
        self.num_bytes = sum(file.num_bytes for file in self._files)
        self.fingerprint = digest.hexdigest()
        self.fp8_names = frozenset(name for name in self.shapes if self._type_of(name) == "F8_E4M3")
        for name in self.fp8_names:
            self._check_scales(name)

    def read(self, name: str) -> NDArray[Any]:
        if name in self.fp8_names:
            return self.read_fp8(name).dequantized()
        tensor = self._read_stored(name)
        if self._is_difference(name):
            return tensor.astype(np.float32) + np.float32(1)
        return tensor

    def in_file(self, name: str) -> FileTensor | None:
        if self._is_difference(name):
            return None
        file, stored_name = self._file_of[name]
        return file.in_file(stored_name)

    def read_fp8(self, name: str) -> Fp8Tensor:
        """
        Raises:
            CheckpointError: a factor is not a finite number.
        """
        values = self._read_stored(name)
        scales = self._read_stored(f"{name}_scale").astype(np.float32).reshape(-1)
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{self._folder}: {name}_scale holds something else than finite numbers")
        return Fp8Tensor(values, np.ascontiguousarray(np.broadcast_to(scales, len(values))))

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _is_difference(self, name: str) -> bool:
        return self.config.architecture == "gemma3" and is_norm(name)

    def _read_stored(self, name: str) -> NDArray[Any]:
        file, stored_name = self._file_of[name]
        return file.read(stored_name)

    def _type_of(self, name: str) -> str:
        file, stored_name = self._file_of[name]
        return file.type_of(stored_name)

    def _check_scales(self, name: str) -> None:
        shape, scales = self.shapes[name], self.shapes.get(f"{name}_scale")
        if scales is None:
            raise CheckpointError(f"{self._folder}: tensor {name} is in FP8, and {name}_scale is missing")
        if len(shape) != 2 or not is_scale_shape(scales, shape[0]):
            raise CheckpointError(
                f"{self._folder}: {name}_scale has shape {list(scales)} for {name} of shape {list(shape)}; "
                "supported is one factor for each row or for the whole matrix"
            )

    def _check_modelopt(self) -> None:
        """Older checkpoints of ModelOpt say in a file of their own how they are quantized."""
        path = self._folder / _MODELOPT_CONFIG
        if not path.exists():
            return
        try:
            fields = ConfigFields(_read_json(path, _MAX_CONFIG_BYTES)).mapping("quantization")
            if fields.has("quant_algo"):
                check_modelopt(fields.text("quant_algo"))
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def _weight_files(self) -> list[Path]:
        if (self._folder / _INDEX).exists():
            index = _read_json(self._folder / _INDEX, _MAX_INDEX_BYTES)
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise CheckpointError(f"{self._folder / _INDEX}: weight_map must map tensors to file names")
            return [self._shard(name) for name in sorted(set(weight_map.values()))]
        if (self._folder / _SINGLE_FILE).exists():
            return [self._shard(_SINGLE_FILE)]
        pickles = sorted(p.name for p in self._folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(
                f"{self._folder} holds its weights as Python pickles ({pickles[0]}), which can run any code "
                "and are never opened. Use a safetensors version of the model, or convert it yourself"
            )
        raise CheckpointError(f"{self._folder} holds neither {_SINGLE_FILE} nor {_INDEX}")

    def _shard(self, name: str) -> Path:
        """A file of the folder itself; links may lead into the blobs of the hub's cache, nowhere else."""
        path = self._folder / name
        if (
            PurePosixPath(name).name != name
            or "\\" in name
            or "\0" in name
            or not name.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{self._folder / _INDEX} names {name[:80]!r}, which is no file of its folder"
            )
        try:
            target = path.resolve(strict=True)
        except OSError as error:
            raise CheckpointError(f"{path} is missing; is the download complete?") from error
        folder = self._folder.resolve()
        allowed = [folder]
        if folder.parent.name == "snapshots":
            allowed.append(folder.parent.parent / "blobs")
        if target.parent not in allowed or not target.is_file():
            raise CheckpointError(f"{path} leads out of the model's folder")
        return path


def _canonical(stored_name: str) -> str:
    for prefix, replacement in _LANGUAGE_MODEL_PREFIXES:
        if stored_name.startswith(prefix):
            return replacement + stored_name[len(prefix) :]
    return stored_name


def _read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes} bytes")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value
