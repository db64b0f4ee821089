"""The whole GPU executor on a CPU: host memory for the device's, Triton's interpreter for its kernels.

Only for processes in which TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine_runtime.executors.tensorrt import batch, decoder, executor
from engine_runtime.executors.tensorrt.batch import DeviceBatch, StepInputs
from engine_runtime.executors.tensorrt.buckets import Buckets, decode_buckets
from engine_runtime.executors.tensorrt.decoder import DeviceDecoder, KvCache
from engine_runtime.executors.tensorrt.executor import MAX_IN_FLIGHT, TensorRTExecutor
from engine_runtime.executors.tensorrt.kernel_segment import KernelSegment
from engine_runtime.executors.tensorrt.weight_loading import load_weights
from engine_runtime.executors.tensorrt.weight_plan import WeightPlan
from engine_runtime.kernels import gpu_sampling
from engine_runtime.kernels.compile import kernel_modules
from engine_runtime.kernels.gpu_attention import AttentionShape, PagedAttention
from engine_runtime.kernels.gpu_sampling import GpuSampler
from engine_runtime.weights.checkpoint import Checkpoint
from scheduler.messages import ExecutorSpec
from tests.engine_runtime.executors.test_trt_weights import ArrayTarget
from tests.engine_runtime.kernels.interpreted_kernels import InterpretedLibrary
from tests.engine_runtime.kernels.interpreted_sampler import HostBuffer, HostEvent

_MAX_SEQS = 4
_MAX_TOKENS = 64
_MAX_LEN = 256
_BLOCKS = 12


class _Buffer(HostBuffer):
    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> _Buffer:
        made = cls(array.nbytes)
        made.array[:] = np.frombuffer(array.tobytes(), np.uint8)
        return made


class _Stream:
    """Does at once what is enqueued."""

    handle = 0

    def copy_to_device(self, destination: int, source: int, num_bytes: int) -> None:
        ctypes.memmove(destination, source, num_bytes)

    copy_to_host = copy_to_device

    def copy_rows_to_device(
        self, destination: int, source: int, num_rows: int, num_bytes: int, stride: int
    ) -> None:
        for row in range(num_rows):
            ctypes.memmove(destination + row * stride, source + row * stride, num_bytes)

    def fill(self, destination: int, byte: int, num_bytes: int) -> None:
        ctypes.memset(destination, byte, num_bytes)

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Graph:
    """Takes the place of ``CudaGraph``."""

    def __init__(self, stream: Any, enqueue: Callable[[], None]) -> None:
        self._enqueue = enqueue

    def launch(self, stream: Any) -> None:
        self._enqueue()

    def close(self) -> None:
        pass


class _Weights(ArrayTarget):
    """Takes the place of ``DeviceWeights``."""

    def __init__(self, plan: WeightPlan, checkpoint: Checkpoint) -> None:
        super().__init__(plan.num_bytes + 256)
        self._plan = plan
        self._start = -self.memory.ctypes.data % 256
        self.memory = self.memory[self._start :]
        load_weights(plan, checkpoint, self.open_lane)
        self.embedding = self.memory.ctypes.data + plan.embedding_offset
        self.quantization_of = plan.quantization_of
        self.dtype_of = plan.dtype_of

    def addresses(self, layer: int) -> dict[str, int]:
        offsets = self._plan.offsets(layer)
        return {name: self.memory.ctypes.data + offset for name, offset in offsets.items()}

    def free(self) -> None:
        pass


def use_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all that the executor consists of."""
    for module in (batch, decoder, executor, gpu_sampling):
        for name, replacement in (
            ("DeviceBuffer", _Buffer),
            ("PinnedBuffer", _Buffer),
            ("Event", HostEvent),
            ("CudaGraph", _Graph),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)


def interpreted_executor(checkpoint: Checkpoint) -> TensorRTExecutor:
    """As ``factory`` makes it, for a model whose segments our kernels compute."""
    model = checkpoint.config
    specs = [
        spec for name in kernel_modules() for spec in getattr(importlib.import_module(name), "SPECS", ())
    ]
    library: Any = InterpretedLibrary(specs)
    stream: Any = _Stream()
    attention = PagedAttention(
        library,
        AttentionShape(
            num_heads=model.num_attention_heads,
            num_kv_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            dtype="bf16",
            kv_dtype="same",
            scale=model.attention_scale,
            softcap=model.attention_logit_softcap,
        ),
        max_sequences=_MAX_SEQS,
        num_multiprocessors=2,
        windows=[layer.sliding_window for layer in model.layers],
    )
    sampler = GpuSampler(library, model.vocab_size, _MAX_SEQS, 2 * _MAX_SEQS)
    inputs = StepInputs(
        max_num_seqs=_MAX_SEQS,
        max_tokens=_MAX_TOKENS,
        max_rows=_MAX_SEQS,
        max_blocks=-(-_MAX_LEN // attention.block_size),
        max_tiles=attention.max_prefill_tiles(_MAX_TOKENS, _MAX_SEQS),
        sampling_bytes=sampler.input_bytes,
        num_copies=MAX_IN_FLIGHT,
    )
    segments: Any = SimpleNamespace(
        make=lambda kind, num_tokens: KernelSegment(model, kind, num_tokens, library, 2),
        close=lambda: None,
    )
    weights: Any = _Weights(WeightPlan(model), checkpoint)
    made = DeviceDecoder(
        model,
        stream,
        library=library,
        segments={"none": segments},
        weights=weights,
        attention=attention,
        sampler=sampler,
        cache=KvCache(model.num_hidden_layers, _BLOCKS, attention.shape.kv_block_bytes),
        inputs=inputs,
        max_tokens=_MAX_TOKENS,
        max_rows=_MAX_SEQS,
        max_len=_MAX_LEN,
        workspace_bytes=8 << 20,
        dtype="bf16",
    )
    batch_of_device = DeviceBatch(
        inputs,
        max_slots=2 * _MAX_SEQS,
        max_rows=_MAX_SEQS,
        block_size=attention.block_size,
        decode_buckets=Buckets(decode_buckets(_MAX_SEQS)),
        token_buckets=Buckets((8, _MAX_TOKENS)),
        tiles=attention.prefill_tiles,
        widened_starts=attention.widened_starts,
    )
    spec = ExecutorSpec(
        model_id="interpreted",
        vocab_size=model.vocab_size,
        block_size=attention.block_size,
        num_blocks=_BLOCKS,
        max_model_len=_MAX_LEN,
        max_num_seqs=_MAX_SEQS,
        max_num_batched_tokens=_MAX_TOKENS,
        device="interpreter",
        embedding_size=model.hidden_size if made.can_pool else 0,
    )
    device: Any = SimpleNamespace(close=lambda: None)
    builds: Any = SimpleNamespace(close=lambda: None)
    return TensorRTExecutor(spec, device, stream, made, batch_of_device, inputs, sampler, builds)
