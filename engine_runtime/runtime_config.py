"""What to load and how, as the server says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much is done, how much there is)."""


@dataclass(frozen=True)
class RuntimeConfig:
    """What to load and how.

    Attributes:
        model_path: a folder in Hugging Face format or a .gguf file.
        device: ``auto`` takes the first NVIDIA GPU if there is one that can compute the model; one that
            fails, or is too small, is an error all the same.
        dtype: on a CPU ``float32``, which is exact, or ``int8``, which quantizes matrix products; on a GPU
            ``bfloat16``. ``auto`` is int8 where the processor multiplies 8-bit numbers exactly (VNNI),
            else float32, and bfloat16 on a GPU.
        quantization: of the projections of every layer, on a GPU. ``fp8`` is E4M3 with a factor for each
            row, made while loading; ``auto`` is what the checkpoint holds.
        kv_cache_dtype: ``auto`` is that of the activations; ``fp8``, on a GPU, is E4M3.
        max_model_len: longest sequence; None: what the model claims, if memory allows.
        kv_cache_bytes: None: a part of the memory that is available.
        gpu_memory_utilization: of a GPU's memory, the part that may be used in all.
        max_num_seqs: None: 64 on a CPU, 256 on a GPU.
        max_num_batched_tokens: None: 256 on a CPU, 4096 on a GPU; at least ``max_num_seqs``.
        block_size: None: 16 on a CPU; a GPU always takes that of its kernels.
        num_threads: None: one for each core that this process may use.
    """

    model_path: Path
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "int8", "bfloat16"] = "auto"
    quantization: Literal["auto", "none", "fp8"] = "auto"
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    num_threads: int | None = None


class DeviceError(ValueError):
    """The device that was asked for cannot be used; the message says what to change."""


class UnsupportedDeviceError(DeviceError):
    """The device will never do for this model; ``--device auto`` takes another one."""
