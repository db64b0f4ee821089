"""Makes the executor for an NVIDIA GPU."""

from __future__ import annotations

import dataclasses
import logging
import time
from contextlib import ExitStack
from typing import Literal

from engine_runtime.cuda import CudaDevice, CudaError, NoDeviceError, Stream
from engine_runtime.executors.attention_parity import attention_parity
from engine_runtime.executors.memory_plan import MemoryPlan, MemoryPlanError, make_plan
from engine_runtime.executors.tensorrt.batch import DeviceBatch, StepInputs
from engine_runtime.executors.tensorrt.buckets import largest_step, saturating_tokens
from engine_runtime.executors.tensorrt.decoder import DeviceDecoder, KvCache, buffer_sizes
from engine_runtime.executors.tensorrt.executor import MAX_IN_FLIGHT, TensorRTExecutor
from engine_runtime.executors.tensorrt.library import TensorRTError
from engine_runtime.executors.tensorrt.model_segments import choose_segments
from engine_runtime.executors.tensorrt.weights import DeviceWeights
from engine_runtime.kernels.attention_layout import BLOCK_SIZE, MAX_SEQUENCES
from engine_runtime.kernels.gpu_attention import AttentionShape, PagedAttention
from engine_runtime.kernels.gpu_sampling import GpuSampler
from engine_runtime.kernels.kernel_library import KernelLibrary, KernelsMissingError
from engine_runtime.kernels.sampling_layout import MAX_VOCAB_SIZE
from engine_runtime.model_config import ModelConfig
from engine_runtime.runtime_config import DeviceError, Progress, RuntimeConfig, UnsupportedDeviceError
from engine_runtime.weights.checkpoint import Checkpoint
from scheduler.executor import ExecutorLostError
from scheduler.messages import (
    ExecutorSpec,
    NewSequence,
    SamplingParams,
    ScheduledSequence,
    SchedulerOutput,
)

_logger = logging.getLogger(__name__)
_DEFAULT_SEQS = 256
_DEFAULT_BATCHED_TOKENS = 4096
_ATTENTION_SLOWNESS = 1.6  # 650 TFLOP/s of products and 400 (450 by now) of attention to a prompt, on an H200
_LEAST_ROWS = 64  # of logits in one run; prompts with logprobs need one a token
_GRAPHS_AND_CODE_BYTES = 256 << 20
_KV_ATTEMPTS = 4
_WIDENED_STEPS, _WIDENED_SHARE = 4, 1 / 64
_DTYPE: Literal["bf16"] = "bf16"


def open_gpu(*, is_required: bool) -> CudaDevice | None:
    """The first GPU that the driver shows, or None if there is none and it is not required.

    Raises:
        DeviceError: there is none, or it cannot be used.
    """
    try:
        return CudaDevice()
    except NoDeviceError as error:
        if is_required:
            raise DeviceError(f"--device cuda: {error}") from error
        _logger.info("no GPU: %s", error)
        return None
    except CudaError as error:
        raise DeviceError(f"the GPU cannot be used ({error}); --device cpu does without") from error


def create_gpu_executor(
    config: RuntimeConfig,
    device: CudaDevice,
    model: ModelConfig,
    checkpoint: Checkpoint | None,
    report: Progress,
) -> tuple[TensorRTExecutor, MemoryPlan]:
    """Loads a model to a GPU.

    Args:
        device: closed when nothing comes of it.
        checkpoint: None fills the weights with random numbers, for benchmarks.

    Raises:
        CheckpointError: the model cannot be used.
        DeviceError: the GPU, its kernels or TensorRT cannot be used for this model.
        MemoryPlanError: it does not fit; nothing was loaded.
    """
    with ExitStack() as undo:  # last made, first freed
        undo.callback(device.close)
        try:
            made = _create(config, device, model, checkpoint, report, undo)
        except (KernelsMissingError, TensorRTError) as error:
            raise UnsupportedDeviceError(f"{error} (--device cpu does without the GPU)") from error
        except CudaError as error:
            if error.name == "CUDA_ERROR_OUT_OF_MEMORY":
                raise MemoryPlanError(
                    "The GPU's memory ran out while the model was loaded: other programs take it, or "
                    "--gpu-memory-utilization is too high."
                ) from error
            raise DeviceError(f"the GPU cannot be used ({error}); --device cpu does without") from error
        except ExecutorLostError as error:
            raise DeviceError(f"{error} (--device cpu does without the GPU)") from error
        undo.pop_all()
        return made


def _check(config: RuntimeConfig, model: ModelConfig) -> None:
    """
    Raises:
        DeviceError: no kernel takes this, which is known without a device.
    """
    if config.dtype not in ("auto", "bfloat16"):
        raise DeviceError(f"--dtype {config.dtype} is for CPUs (--device cpu); a GPU takes bfloat16")
    if (config.max_num_seqs or 0) > MAX_SEQUENCES:
        raise DeviceError(f"--max-num-seqs {config.max_num_seqs}: the GPU kernels take up to {MAX_SEQUENCES}")
    if model.vocab_size > MAX_VOCAB_SIZE:
        raise UnsupportedDeviceError(
            f"a vocabulary of {model.vocab_size}: the GPU kernels take up to {MAX_VOCAB_SIZE} "
            "(--device cpu does without)"
        )
    if model.hidden_size % 16:
        raise UnsupportedDeviceError(
            f"a hidden size of {model.hidden_size}: the GPU kernels take multiples of 16 "
            "(--device cpu does without)"
        )


def _create(
    config: RuntimeConfig,
    device: CudaDevice,
    model: ModelConfig,
    checkpoint: Checkpoint | None,
    report: Progress,
    undo: ExitStack,
) -> tuple[TensorRTExecutor, MemoryPlan]:
    """``undo`` gets what frees everything that was made."""
    _check(config, model)
    max_seqs = config.max_num_seqs or _DEFAULT_SEQS
    max_tokens = max(config.max_num_batched_tokens or _DEFAULT_BATCHED_TOKENS, max_seqs)
    max_rows = max(max_seqs, _LEAST_ROWS)
    capacity = largest_step(max_tokens, max_rows)
    library = KernelLibrary(device)
    segments = choose_segments(config, model, device, library, checkpoint, max_tokens, max_rows)
    undo.callback(segments.close)
    weight_plan = segments.plan
    shape = AttentionShape(
        num_heads=model.num_attention_heads,
        num_kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        dtype=_DTYPE,
        kv_dtype="fp8" if config.kv_cache_dtype == "fp8" else "same",
        scale=model.attention_scale,
        softcap=model.attention_logit_softcap,
    )
    if shape.kv_dtype == "fp8" and device.properties.compute_capability < (8, 9):
        raise UnsupportedDeviceError(
            "--kv-cache-dtype fp8 needs compute capability 8.9 or later; --kv-cache-dtype auto does without"
        )
    try:
        attention = PagedAttention(
            library,
            shape,
            max_sequences=max_rows,
            num_multiprocessors=device.properties.num_multiprocessors,
            windows=[layer.sliding_window for layer in model.layers],
            num_widened_blocks=_widened_blocks(
                shape,
                config.max_model_len or model.max_position_embeddings,
                max_tokens,
                device.properties.total_memory,
            ),
        )
    except ValueError as error:
        raise UnsupportedDeviceError(f"{error} (--device cpu does without)") from error
    free, total = device.memory()
    available = min(free, int(total * config.gpu_memory_utilization) - (total - free))
    activations = (
        sum(buffer_sizes(model, capacity, max_rows).values())
        + attention.workspace_bytes
        + segments.workspace_bytes
        + _length_bytes(model, config.max_model_len or model.max_position_embeddings, max_rows)
        + GpuSampler.device_bytes(max_rows, 2 * max_seqs)
        + GpuSampler.most_bytes_later(model.vocab_size, 2 * max_seqs)
        + _GRAPHS_AND_CODE_BYTES
    )
    if weight_plan.num_bytes + activations > available:
        raise MemoryPlanError(
            f"{device.properties.name} has {max(0, available) / 2**30:.1f} GiB to give "
            f"({(total - free) / 2**30:.1f} of {total / 2**30:.1f} are in use, --gpu-memory-utilization "
            f"{config.gpu_memory_utilization}); the weights take {weight_plan.num_bytes / 2**30:.1f} GiB and "
            f"the buffers of a step {activations / 2**30:.1f}. Lower --max-num-batched-tokens or "
            "--max-num-seqs, or take a smaller model, --quantization fp8 or --device cpu."
        )
    plan = make_plan(
        weight_bytes=weight_plan.num_bytes,
        load_bytes=0,
        activation_bytes=activations,
        block_size=attention.block_size,
        block_bytes=model.num_hidden_layers * shape.kv_block_bytes,
        kv_limit_bytes=max(0, available - weight_plan.num_bytes - activations),
        claimed_len=model.max_position_embeddings,
        max_model_len=config.max_model_len,
        max_num_seqs=max_seqs,
        kv_cache_bytes=config.kv_cache_bytes,
        available_bytes=available,
    )
    stream = Stream()
    undo.callback(stream.close)
    weights = DeviceWeights(weight_plan)
    undo.callback(weights.free)
    if checkpoint is None:
        weights.fill_randomly(library=library)
    else:
        weights.load(checkpoint, device, lambda done, size: report("weights", done, size), library)
    sampler = GpuSampler(library, model.vocab_size, max_rows, 2 * max_seqs)
    undo.callback(sampler.close)
    inputs = StepInputs(
        max_num_seqs=max_rows,
        max_tokens=capacity,
        max_rows=max_rows,
        max_blocks=-(-plan.max_model_len // plan.block_size),
        max_tiles=attention.max_prefill_tiles(max_tokens, max_rows),
        sampling_bytes=sampler.input_bytes,
        num_copies=MAX_IN_FLIGHT,
    )
    undo.callback(inputs.free)
    cache, plan = _allocate_cache(model.num_hidden_layers, shape.kv_block_bytes, plan)
    undo.callback(cache.free)
    decoder = DeviceDecoder(
        model,
        stream,
        library=library,
        segments=segments.factories,
        weights=weights,
        attention=attention,
        sampler=sampler,
        cache=cache,
        inputs=inputs,
        max_tokens=capacity,
        max_rows=max_rows,
        max_len=plan.max_model_len,
        workspace_bytes=segments.workspace_bytes,
        dtype=_DTYPE,
    )
    undo.callback(decoder.close)
    segments.tune(decoder, stream, report)
    rows, tokens, builds = segments.buckets()
    undo.callback(builds.close)
    batch = DeviceBatch(
        inputs,
        max_slots=2 * max_seqs,
        max_rows=max_rows,
        block_size=plan.block_size,
        decode_buckets=rows,
        token_buckets=tokens,
        tiles=attention.prefill_tiles,
        widened_starts=attention.widened_starts,
    )
    fingerprint = "random" if checkpoint is None else checkpoint.fingerprint
    kinds = ["bfloat16"]
    if (quantized := segments.describe()) is not None:
        kinds.append(quantized)
    if shape.kv_dtype == "fp8":
        kinds.append("fp8 KV cache")
    spec = ExecutorSpec(
        model_id="-".join([fingerprint, *kinds]),
        vocab_size=model.vocab_size,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        max_model_len=plan.max_model_len,
        max_num_seqs=max_seqs,
        max_num_batched_tokens=max_tokens,
        device=f"{device.properties.name} ({', '.join(kinds)})",
        attention_parity=attention_parity(model, _ATTENTION_SLOWNESS),
        saturating_num_tokens=saturating_tokens(model.hidden_size, device.properties.num_multiprocessors),
        embedding_size=model.hidden_size if decoder.can_pool else 0,
    )
    executor = TensorRTExecutor(spec, device, stream, decoder, batch, inputs, sampler, builds)
    report("first step", 0, 1)
    _warm_up(executor)
    report("first step", 1, 1)
    return executor, plan


def _widened_blocks(shape: AttentionShape, longest: int, max_tokens: int, total_memory: int) -> int:
    """For contexts of an FP8 cache with 16 bits: one sequence of any length, or some steps of prompts, in a
    small share of the GPU's memory."""
    if shape.kv_dtype != "fp8":
        return 0
    wanted = -(-max(longest, _WIDENED_STEPS * max_tokens) // BLOCK_SIZE)
    return min(wanted, int(total_memory * _WIDENED_SHARE) // (2 * shape.kv_block_bytes))


def _length_bytes(model: ModelConfig, max_len: int, max_rows: int) -> int:
    """Of what grows with the longest sequence, the KV cache aside: rotary and block tables."""
    kinds = len({layer.rope for layer in model.layers})
    return kinds * 2 * 4 * max_len * (model.head_dim // 2) + 4 * max_rows * -(-max_len // BLOCK_SIZE)


def _allocate_cache(num_layers: int, block_bytes: int, plan: MemoryPlan) -> tuple[KvCache, MemoryPlan]:
    """The KV cache of the plan, or a smaller one if a neighbour on the GPU has taken memory since.

    Raises:
        MemoryPlanError: not even one sequence of the greatest length fits any more.
    """
    for _ in range(_KV_ATTEMPTS):
        try:
            return KvCache(num_layers, plan.num_blocks, block_bytes), plan
        except CudaError as error:
            if error.is_fatal:
                raise
            _logger.warning("no memory for %d KV blocks; trying fewer", plan.num_blocks)
            time.sleep(0.2)
            plan = dataclasses.replace(plan, num_blocks=plan.num_blocks * 7 // 8)
            if plan.num_full_sequences < 1:
                break
    raise MemoryPlanError(f"Other programs take this GPU's memory while the server starts.\n{plan.table()}")


def _warm_up(executor: TensorRTExecutor) -> None:
    """A prompt and some tokens through everything, so that the first request waits for less."""
    spec = executor.spec
    length = min(2, spec.max_num_batched_tokens, spec.max_model_len)
    new = NewSequence("warm-up", (0,) * length, length, 0, (0,), SamplingParams(temperature=0.0))
    steps = [ScheduledSequence("warm-up", 0, length, (), True)]
    ends = range(length, min(length + 2, spec.max_model_len))
    steps += [ScheduledSequence("warm-up", start, 1, (), True) for start in ends]
    for i, share in enumerate(steps):
        executor.execute(SchedulerOutput(i, (new,) if i == 0 else (), (share,), ())).result()
    executor.execute(SchedulerOutput(len(steps), (), (), ("warm-up",))).result()
