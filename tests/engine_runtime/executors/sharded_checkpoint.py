"""Small random checkpoints in several files, and what a plan makes of them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from engine_runtime.executors.tensorrt.weight_plan import WeightPlan
from engine_runtime.weights.checkpoint import Checkpoint, open_checkpoint
from engine_runtime.weights.expected_tensors import expected_tensors, is_norm
from engine_runtime.weights.hf_config import read_hf_config
from tests.engine_runtime.executors.test_trt_weights import rounded_to_fp8
from tests.reference.tiny_checkpoints import CONFIGS

Array = npt.NDArray[Any]
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class ShardedCheckpoint:
    """
    Attributes:
        tensors: as they are stored.
    """

    folder: Path
    tensors: dict[str, Array]
    is_gemma: bool

    def open(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def expected(self, plan: WeightPlan) -> dict[int, Array]:
        """Bytes on the device by their offset."""
        memory: dict[int, Array] = {}
        for tensor in plan.tensors:
            values = self.tensors[tensor.name]
            if self.is_gemma and is_norm(tensor.name):
                values = values.astype(np.float32) + np.float32(1)
            values = values.astype(_TYPES[tensor.dtype])
            if tensor.scale_offset is None:
                memory[tensor.offset] = _bytes(values)
                continue
            rounded = rounded_to_fp8(values)
            memory[tensor.offset] = _bytes(rounded.values)
            memory[tensor.scale_offset] = _bytes(rounded.scales)
        return memory


def write_sharded_checkpoint(
    folder: Path,
    architecture: str,
    seed: int = 0,
    types: tuple[str, ...] = ("bfloat16",),
    **changes: int,
) -> ShardedCheckpoint:
    """Odd sizes, data that begins at odd bytes, three files; each tensor in one of the ``types``.

    Args:
        changes: sizes that are not to be random.
    """
    rng, random_values = random.Random(seed), np.random.default_rng(seed)
    sizes = {
        "hidden_size": 16 * rng.randint(2, 9),
        "intermediate_size": rng.randint(33, 300),
        "vocab_size": rng.randint(50, 999),
        "head_dim": 2 * rng.randint(4, 20),
    }
    config = CONFIGS[architecture] | sizes | changes
    model = read_hf_config(config, {})
    tensors = {
        name: random_values.standard_normal(shape).astype(_TYPES[rng.choice(types)])
        for name, shape in expected_tensors(model).items()
        if not (model.tie_word_embeddings and name == "lm_head.weight")
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files = {name: f"part-{rng.randint(1, 3)}.safetensors" for name in tensors}
    for file in sorted(set(files.values())):
        _write(folder / file, {name: tensors[name] for name in tensors if files[name] == file})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return ShardedCheckpoint(folder, tensors, architecture == "gemma3")


def _write(path: Path, tensors: dict[str, Array]) -> None:
    header, data = {}, b""
    for name, values in tensors.items():
        stored = _bytes(values).tobytes()
        header[name] = {
            "dtype": _NAMES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(stored)],
        }
        data += stored
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _bytes(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
