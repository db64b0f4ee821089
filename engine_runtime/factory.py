"""Makes the executor for a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine_runtime.executors.cpu_limits import available_memory, return_freed_memory, usable_cores
from engine_runtime.executors.decoder_graph import DecoderGraph, build_decoder, transpose_weights
from engine_runtime.executors.decoder_session import DecoderSession
from engine_runtime.executors.embedding import EmbeddingTable
from engine_runtime.executors.memory_plan import MemoryPlan, MemoryPlanError, make_plan
from engine_runtime.executors.onnxruntime import OnnxRuntimeExecutor
from engine_runtime.executors.quantization import fuse_quantized, quantize_matmuls
from engine_runtime.kernels.cpu import allocate_kv_cache, multiplies_int8_exactly, supports_float16
from engine_runtime.weights.checkpoint import Checkpoint, open_checkpoint
from engine_runtime.weights.errors import CheckpointError
from scheduler.executor import Executor
from scheduler.messages import (
    ExecutorSpec,
    NewSequence,
    SamplingParams,
    ScheduledSequence,
    SchedulerOutput,
)

__all__ = [
    "CheckpointError",
    "MemoryPlan",
    "MemoryPlanError",
    "RuntimeConfig",
    "create_executor",
    "plan_memory",
]

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much is done, how much there is)."""

_LEAST_ROWS = 64  # rows of logits in one run; prompts with logprobs need one a token


@dataclass(frozen=True)
class RuntimeConfig:
    """What to load and how.

    Attributes:
        model_path: a folder in Hugging Face format or a .gguf file.
        dtype: ``float32`` is exact; ``int8`` quantizes the matrix products; ``auto`` is int8
            where the processor multiplies 8-bit numbers exactly (VNNI), else float32.
        max_model_len: longest sequence; None: what the model claims, if memory allows.
        kv_cache_bytes: None: a part of the memory that is available.
        num_threads: None: one for each core that this process may use.
    """

    model_path: Path
    dtype: Literal["auto", "float32", "int8"] = "auto"
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    num_threads: int | None = None


def plan_memory(config: RuntimeConfig, checkpoint: Checkpoint) -> MemoryPlan:
    """Divides the memory, from the checkpoint's headers alone.

    Raises:
        MemoryPlanError: it does not fit.
    """
    return _plan(config, checkpoint, _decoder_graph(config, checkpoint))


def create_executor(config: RuntimeConfig, progress: Progress | None = None) -> tuple[Executor, MemoryPlan]:
    """Opens a model and loads it.

    Raises:
        CheckpointError: the model cannot be used.
        MemoryPlanError: it does not fit; nothing was loaded.
    """
    report = progress or (lambda what, done, total: None)
    checkpoint = open_checkpoint(config.model_path)
    try:
        model = checkpoint.config
        graph = _decoder_graph(config, checkpoint)
        plan = _plan(config, checkpoint, graph)
        is_quantized = _is_quantized(graph)
        num_threads = config.num_threads or usable_cores()
        cache = allocate_kv_cache(
            model.num_hidden_layers,
            plan.num_blocks,
            plan.block_size,
            model.num_key_value_heads,
            model.head_dim,
            _kv_dtype(graph),
        )
        table = checkpoint.read("model.embed_tokens.weight").astype("float32", copy=False)
        embedding = EmbeddingTable(table, model.embedding_scale, is_quantized=is_quantized)
        del table
        session = DecoderSession(
            graph,
            checkpoint,
            cache,
            max_tokens=config.max_num_batched_tokens,
            max_sampled=_max_rows(config),
            max_len=plan.max_model_len,
            num_threads=num_threads,
            progress=report,
        )
        dtype = "int8" if is_quantized else "float32"
        spec = ExecutorSpec(
            model_id=f"{checkpoint.fingerprint}-{dtype}",
            vocab_size=model.vocab_size,
            block_size=plan.block_size,
            num_blocks=plan.num_blocks,
            max_model_len=plan.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            device=f"cpu ({num_threads} thread{'s' if num_threads > 1 else ''}, {dtype})",
        )
    finally:
        checkpoint.close()
    report("sampler", 0, 1)
    executor = OnnxRuntimeExecutor(spec, session, embedding, max_rows=_max_rows(config))
    return_freed_memory()
    report("sampler", 1, 1)
    report("first step", 0, 1)
    _warm_up(executor)
    report("first step", 1, 1)
    return executor, plan


def _warm_up(executor: Executor) -> None:
    """One token through everything, so that the first request waits for nothing."""
    params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=1, prompt_logprobs=1)
    new = NewSequence("warm-up", (0, 0), 2, 0, (0,), params)
    share = ScheduledSequence("warm-up", 0, 2, (), True)
    executor.execute(SchedulerOutput(0, (new,), (share,), ())).result()
    executor.execute(SchedulerOutput(1, (), (), ("warm-up",))).result()


def _max_rows(config: RuntimeConfig) -> int:
    return max(config.max_num_seqs, _LEAST_ROWS)


def _decoder_graph(config: RuntimeConfig, checkpoint: Checkpoint) -> DecoderGraph:
    graph = build_decoder(checkpoint.config)
    transpose_weights(graph)
    if config.dtype == "int8" or (config.dtype == "auto" and multiplies_int8_exactly()):
        quantize_matmuls(graph)
        fuse_quantized(graph)
    return graph


def _is_quantized(graph: DecoderGraph) -> bool:
    return any(weight.form == "int8" for weight in graph.weights.values())


def _kv_dtype(graph: DecoderGraph) -> npt.DTypeLike:
    """With many sequences, decoding waits for keys and values: float16 halves that, far finer than int8."""
    return np.float16 if _is_quantized(graph) and supports_float16() else np.float32


def _plan(config: RuntimeConfig, checkpoint: Checkpoint, graph: DecoderGraph) -> MemoryPlan:
    model = checkpoint.config
    stored = sum(weight.num_bytes for weight in graph.weights.values())
    entries = model.vocab_size * model.hidden_size
    table = entries if _is_quantized(graph) else 4 * entries
    # A layer's buffers are reused by the next one.
    widths = 3 * model.hidden_size + 2 * model.qkv_size + 2 * model.q_size + 5 * model.intermediate_size
    activations = 4 * (config.max_num_batched_tokens * widths + _max_rows(config) * model.vocab_size)
    return make_plan(
        model,
        weight_bytes=stored + table,
        load_bytes=stored,  # each matrix exists twice until the session has packed it
        activation_bytes=activations,
        block_size=config.block_size,
        kv_dtype=_kv_dtype(graph),
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_bytes=config.kv_cache_bytes,
        available_bytes=available_memory(),
    )
