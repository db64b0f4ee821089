"""The tensors of a GGUF file under their canonical names, dequantized."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from engine_runtime.model_config import ConfigError, ModelConfig
from engine_runtime.weights.errors import CheckpointError
from engine_runtime.weights.file_tensor import FileTensor
from engine_runtime.weights.fp8_tensor import Fp8Tensor
from engine_runtime.weights.gguf_config import read_gguf_config
from engine_runtime.weights.gguf_file import GgufFile, GgufTensor
from engine_runtime.weights.tensor_source import stored_floats

_STORED: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DEQUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

_DEQUANTIZED_AT_ONCE = 1 << 16

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_BLOCK_NAMES = {
    **_BLOCK_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")


class GgufTensors:
    """The tensors of a .gguf file; implements ``TensorSource``.

    F32, F16 and BF16 are views of the file; quantized tensors are computed as float32 at each ``read``. Norm
    weights of Gemma are stored as the factor itself. ``read`` may be called from several threads.

    Raises:
        CheckpointError: the file is broken, one of several parts, or not supported.
    """

    fp8_names = frozenset[str]()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = GgufFile(path)
        if self._file.metadata.get("split.count") not in (None, 0, 1):
            raise CheckpointError(
                f"{path} is one part of a split model; join the parts with: llama-gguf-split --merge"
            )
        try:
            self.config: ModelConfig = self._read_config()
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
        # llama files hold the rows of each query and key head interleaved for another way of rotating.
        is_llama = self._file.metadata["general.architecture"] == "llama"
        self._permuted = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }
        if not is_llama:
            self._permuted = {}

        names = _GEMMA3_BLOCK_NAMES if self.config.architecture == "gemma3" else _BLOCK_NAMES
        self._tensors: dict[str, GgufTensor] = {}
        for tensor in self._file.tensors.values():
            name = _canonical(tensor.name, names)
            if name is not None:
                self._check_type(tensor)
                self._tensors[name] = tensor
        self.shapes: dict[str, tuple[int, ...]] = {n: t.shape for n, t in self._tensors.items()}
        self.num_bytes = sum(t.end - t.start for t in self._tensors.values())
        stat = path.stat()
        digest = hashlib.sha256(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}:".encode())
        digest.update(self._file.header_digest)
        self.fingerprint = digest.hexdigest()

    def read(self, name: str) -> NDArray[Any]:
        tensor = self._read_stored(self._tensors[name])
        num_heads = self._permuted.get(name.split(".")[-2])
        return tensor if num_heads is None else _unpermute(tensor, num_heads)

    def in_file(self, name: str) -> FileTensor | None:
        return None

    def read_fp8(self, name: str) -> Fp8Tensor:
        raise KeyError(name)  # no type of GGUF is E4M3

    def close(self) -> None:
        self._file.close()

    def _read_stored(self, tensor: GgufTensor) -> NDArray[Any]:
        data = self._file.data[tensor.start : tensor.end]
        stored = _STORED.get(tensor.quantization.name)
        if stored is not None:
            return stored_floats(data, stored, tensor.shape)
        return dequantize_blocks(data, tensor.quantization).reshape(tensor.shape)

    def _read_config(self) -> ModelConfig:
        tensors = self._file.tensors
        embedding = tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise ConfigError("the file has no token embeddings; is it a language model?")
        factors = tensors.get("rope_freqs.weight")
        if factors is not None and factors.quantization is not GGMLQuantizationType.F32:
            raise ConfigError(f"rope_freqs.weight has type {factors.quantization.name}; expected F32")
        rope_factors = None if factors is None else tuple(self._read_stored(factors).ravel().tolist())
        return read_gguf_config(self._file.metadata, tensors.keys(), embedding.shape[0], rope_factors)

    def _check_type(self, tensor: GgufTensor) -> None:
        name = tensor.quantization.name
        if name not in _STORED and name not in _DEQUANTIZED:
            raise CheckpointError(
                f"{self._path}: tensor {tensor.name} has type {name}, which is not supported. Use a file "
                f"with types among {', '.join([*_STORED, *_DEQUANTIZED])}"
            )


def _canonical(name: str, block_names: dict[str, str]) -> str | None:
    """The name that Hugging Face gives the tensor; None for one that no supported model uses."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _TOP_NAMES.get(name)
    module = block_names.get(match[2])
    return None if module is None else f"model.layers.{int(match[1])}.{module}.{match[3]}"


def dequantize_blocks(data: NDArray[np.uint8], quantization: GGMLQuantizationType) -> NDArray[np.float32]:
    """Float32 values of whole blocks, computed piece by piece to stay in the processor's cache.

    Args:
        data: bytes of blocks, one after the other.
    """
    block_size, block_bytes = GGML_QUANT_SIZES[quantization]
    data = np.asarray(data)  # each view of a memmap costs microseconds, and there are many
    values = np.empty(len(data) // block_bytes * block_size, np.float32)
    step = _DEQUANTIZED_AT_ONCE // block_size
    for i in range(0, len(data) // block_bytes, step):
        piece = data[i * block_bytes : (i + step) * block_bytes]
        values[i * block_size : (i + step) * block_size] = dequantize(piece[None], quantization)[0]
    return values


def _unpermute(tensor: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Rows of each head from (i, i + d/2) side by side to two halves, as ``rope_tables`` wants them."""
    half = tensor.shape[0] // num_heads // 2
    pairs = tensor.reshape(num_heads, half, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
