"""Makes the executor for a CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine_runtime.executors.attention_parity import attention_parity
from engine_runtime.executors.memory_plan import MemoryPlan, make_plan
from engine_runtime.executors.onnxruntime.cpu_limits import (
    available_memory,
    return_freed_memory,
    usable_cores,
)
from engine_runtime.executors.onnxruntime.decoder_graph import DecoderGraph, build_decoder, transpose_weights
from engine_runtime.executors.onnxruntime.decoder_session import DecoderSession
from engine_runtime.executors.onnxruntime.embedding import EmbeddingTable
from engine_runtime.executors.onnxruntime.executor import OnnxRuntimeExecutor
from engine_runtime.executors.onnxruntime.packed_weights import matrices_of, packed_bytes, suits_tiles
from engine_runtime.executors.onnxruntime.quantization import fuse_quantized, quantize_matmuls
from engine_runtime.kernels.cpu import (
    allocate_kv_cache,
    kv_block_bytes,
    multiplies_int8_exactly,
    supports_float16,
)
from engine_runtime.runtime_config import DeviceError, Progress, RuntimeConfig
from engine_runtime.weights.checkpoint import Checkpoint
from scheduler.executor import Executor
from scheduler.messages import (
    ExecutorSpec,
    NewSequence,
    SamplingParams,
    ScheduledSequence,
    SchedulerOutput,
)

_MAX_NARROW = 8  # tokens of a step up to which the packed weights are faster without AMX
_PACKED_SHARE = 0.1  # of the memory that is available: what packed weights may take as a second copy
_KV_SHARE = 0.3  # of the memory that is available, unless the user says how much
_DEFAULT_SEQS = 64
_DEFAULT_BATCHED_TOKENS = 256
_DEFAULT_BLOCK_SIZE = 16
_ATTENTION_SLOWNESS = 3.0  # beside int8 products, on a Xeon with AMX
_LEAST_ROWS = 64  # rows of logits in one run; prompts with logprobs need one a token


def plan_cpu_memory(config: RuntimeConfig, checkpoint: Checkpoint) -> MemoryPlan:
    """Divides the memory, from the checkpoint's headers alone.

    Raises:
        MemoryPlanError: it does not fit.
    """
    return _plan(config, checkpoint, _decoder_graph(config, checkpoint))


def create_cpu_executor(
    config: RuntimeConfig, checkpoint: Checkpoint, report: Progress
) -> tuple[Executor, MemoryPlan]:
    """Loads a model.

    Raises:
        CheckpointError: the model cannot be used.
        DeviceError: a dtype or a quantization that is none of a CPU's.
        MemoryPlanError: it does not fit; nothing was loaded.
    """
    if config.dtype not in ("auto", "float32", "int8"):
        raise DeviceError(f"--dtype {config.dtype} needs a GPU; a CPU takes float32 or int8")
    if config.quantization != "auto":
        raise DeviceError(
            f"--quantization {config.quantization} is for GPUs; on a CPU, --dtype float32 keeps the weights "
            "as they are and --dtype int8 quantizes them"
        )
    if config.kv_cache_dtype != "auto":
        raise DeviceError(
            f"--kv-cache-dtype {config.kv_cache_dtype} needs a GPU; leave it out, or take --device cuda"
        )
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
        max_tokens=_max_tokens(config),
        max_sampled=_max_rows(config),
        max_len=plan.max_model_len,
        num_threads=num_threads,
        max_packed=_max_packed(config, graph),
        progress=report,
    )
    dtype = "int8" if is_quantized else "float32"
    spec = ExecutorSpec(
        model_id=f"{checkpoint.fingerprint}-{dtype}",
        vocab_size=model.vocab_size,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        max_model_len=plan.max_model_len,
        max_num_seqs=_max_seqs(config),
        max_num_batched_tokens=_max_tokens(config),
        device=f"cpu ({num_threads} thread{'s' if num_threads > 1 else ''}, {dtype})",
        embedding_size=model.hidden_size,
        attention_parity=attention_parity(model, _ATTENTION_SLOWNESS),
    )
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


def _max_seqs(config: RuntimeConfig) -> int:
    return config.max_num_seqs or _DEFAULT_SEQS


def _max_tokens(config: RuntimeConfig) -> int:
    return max(config.max_num_batched_tokens or _DEFAULT_BATCHED_TOKENS, _max_seqs(config))


def _block_size(config: RuntimeConfig) -> int:
    return config.block_size or _DEFAULT_BLOCK_SIZE


def _max_rows(config: RuntimeConfig) -> int:
    return max(_max_seqs(config), _LEAST_ROWS)


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


def _max_packed(config: RuntimeConfig, graph: DecoderGraph) -> int:
    """Steps of so many tokens at most read packed weights; 0 where that copy is not worth its memory."""
    size = packed_bytes(graph)
    if size and suits_tiles(graph):
        return _max_tokens(config)
    return _MAX_NARROW if 0 < size <= available_memory() * _PACKED_SHARE else 0


def _plan(config: RuntimeConfig, checkpoint: Checkpoint, graph: DecoderGraph) -> MemoryPlan:
    model = checkpoint.config
    max_packed = _max_packed(config, graph)
    names = set(graph.weights)
    if max_packed >= _max_tokens(config):
        names -= set(matrices_of(graph))
    stored = sum(graph.weights[name].num_bytes for name in names)
    entries = model.vocab_size * model.hidden_size
    table = entries if _is_quantized(graph) else 4 * entries
    # A layer's buffers are reused by the next one.
    widths = 3 * model.hidden_size + 2 * model.qkv_size + 2 * model.q_size + 5 * model.intermediate_size
    activations = 4 * (_max_tokens(config) * widths + _max_rows(config) * model.vocab_size)
    available_bytes = available_memory()
    return make_plan(
        weight_bytes=stored + table + (packed_bytes(graph) if max_packed else 0),
        load_bytes=stored,  # each exists twice until the session has packed it
        activation_bytes=activations,
        block_size=_block_size(config),
        block_bytes=model.num_hidden_layers
        * kv_block_bytes(_block_size(config), model.num_key_value_heads, model.head_dim, _kv_dtype(graph)),
        kv_limit_bytes=int(available_bytes * _KV_SHARE),
        claimed_len=model.max_position_embeddings,
        max_model_len=config.max_model_len,
        max_num_seqs=_max_seqs(config),
        kv_cache_bytes=config.kv_cache_bytes,
        available_bytes=available_bytes,
    )
