"""Opens a model's weights, whatever their format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine_runtime.model_config import ModelConfig
from engine_runtime.models.segment import WeightInput
from engine_runtime.weights.errors import CheckpointError
from engine_runtime.weights.expected_tensors import EMBEDDING, LM_HEAD, expected_tensors
from engine_runtime.weights.file_tensor import FileTensor
from engine_runtime.weights.fp8_tensor import Fp8Tensor
from engine_runtime.weights.gguf_tensors import GgufTensors
from engine_runtime.weights.hf_folder import PICKLE_SUFFIXES, HfFolder
from engine_runtime.weights.tensor_source import TensorSource


class Checkpoint:
    """The weights of one model, complete and of the right shapes, by their Hugging Face names.

    ``lm_head.weight`` is always there; if the embeddings are tied, it reads as ``model.embed_tokens.weight``.

    Attributes:
        names: all tensors of the model; whatever else the files hold is left out.
        num_bytes: of the tensors as stored in the files.
        fingerprint: hexadecimal, identifies the weights. Made from names, sizes, times of change and headers.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape.
    """

    def __init__(self, config: ModelConfig, source: TensorSource, path: Path) -> None:
        self.config = config
        self.num_bytes = source.num_bytes
        self.fingerprint = source.fingerprint
        self._source = source
        self._is_tied = config.tie_word_embeddings
        expected = expected_tensors(config)
        for name, shape in expected.items():
            stored = source.shapes.get(self._stored_name(name))
            if stored is None:
                raise CheckpointError(f"{path}: tensor {name} is missing; is the download complete?")
            if stored != shape:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {list(stored)}; the configuration says {list(shape)}"
                )
        self.names: tuple[str, ...] = tuple(expected)

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as float32, float16 or bfloat16 (ml_dtypes), in C order.

        Quantized formats are dequantized to float32. Read-only where it is a view of the file; such a view
        stays usable after ``close``. May be called from several threads.

        Raises:
            KeyError: no tensor of the model has this name.
            CheckpointError: its type is not supported.
        """
        return self._source.read(self._stored_name(name))

    @property
    def holds_fp8(self) -> bool:
        """Whether projections are stored in E4M3."""
        return any(self.is_fp8(name) for name in self.names)

    def is_fp8(self, name: str) -> bool:
        """Whether the tensor is stored in E4M3."""
        return self._stored_name(name) in self._source.fp8_names

    def read_fp8(self, name: str) -> Fp8Tensor:
        """A tensor that is stored in E4M3, as it is stored. May be called from several threads.

        Raises:
            CheckpointError: a factor is not a finite number.
        """
        return self._source.read_fp8(self._stored_name(name))

    def in_file(self, name: str) -> FileTensor | None:
        """The values of ``read`` as their file holds them, readable until ``close``; None if it does not.

        Of a tensor in E4M3 it is the values of ``read_fp8``. May be called from several threads.

        Raises:
            CheckpointError: its type is not supported.
        """
        return self._source.in_file(self._stored_name(name))

    def read_weight(
        self, weight: WeightInput, *, layer: int | None = None, next_layer: int | None = None
    ) -> NDArray[Any]:
        """A weight of a segment: its sources, concatenated.

        Args:
            layer, next_layer: as in ``WeightInput.source_names``.

        Returns:
            ``weight.shape``, in the type of the checkpoint, not in that of the graph input.
        """
        parts = [self.read(name) for name in weight.source_names(layer=layer, next_layer=next_layer)]
        if len(parts) == 1:
            return parts[0]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.astype(np.float32) for part in parts]
        return np.concatenate(parts)

    def close(self) -> None:
        """Closes the files."""
        self._source.close()

    def _stored_name(self, name: str) -> str:
        return EMBEDDING if self._is_tied and name == LM_HEAD else name


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a folder in Hugging Face format or a .gguf file. Reads headers only.

    Raises:
        CheckpointError: there is nothing usable at ``path``; the message says why and what to do.
    """
    if path.is_dir():
        if not (path / "config.json").exists():
            files = sorted(path.glob("*.gguf"))
            if files:
                raise CheckpointError(f"{path} holds GGUF files; name one of them, such as {files[0]}")
            raise CheckpointError(f"{path} holds no config.json: it is no model in Hugging Face format")
        folder = HfFolder(path)
        return Checkpoint(folder.config, folder, path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} is a Python pickle, which can run any code and is never opened. "
            "Use a safetensors or GGUF version of the model"
        )
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of a model; name the folder that also holds config.json")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path} is neither a folder in Hugging Face format nor a .gguf file")
    tensors = GgufTensors(path)
    return Checkpoint(tensors.config, tensors, path)
