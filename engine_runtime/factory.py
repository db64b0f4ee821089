"""Makes the executor for a model."""

from __future__ import annotations

import importlib.util
import logging

from engine_runtime.executors.memory_plan import MemoryPlan, MemoryPlanError
from engine_runtime.runtime_config import DeviceError, Progress, RuntimeConfig, UnsupportedDeviceError
from engine_runtime.weights.checkpoint import Checkpoint, open_checkpoint
from engine_runtime.weights.errors import CheckpointError
from scheduler.executor import Executor

__all__ = [
    "CheckpointError",
    "DeviceError",
    "MemoryPlan",
    "MemoryPlanError",
    "RuntimeConfig",
    "create_executor",
]

_logger = logging.getLogger(__name__)


def create_executor(config: RuntimeConfig, progress: Progress | None = None) -> tuple[Executor, MemoryPlan]:
    """Opens a model and loads it to the device.

    Raises:
        CheckpointError: the model cannot be used.
        DeviceError: the device cannot be used.
        MemoryPlanError: it does not fit; nothing was loaded.
    """
    report = progress or (lambda what, done, total: None)
    checkpoint = open_checkpoint(config.model_path)
    try:
        if _wants_gpu(config):
            try:
                made = _on_gpu(config, checkpoint, report)
            except UnsupportedDeviceError as error:
                if _needs_gpu(config):
                    raise
                _logger.warning("the CPU computes, since the GPU cannot: %s", error)
                made = None
            if made is not None:
                return made
        for name in ("onnxruntime", "numba"):
            if importlib.util.find_spec(name) is None:
                raise DeviceError(
                    f"no GPU is used, and the CPU needs more packages ({name}): pip install 'inflightd[cpu]'"
                )
        from engine_runtime.executors.onnxruntime.factory import create_cpu_executor

        return create_cpu_executor(config, checkpoint, report)
    finally:
        checkpoint.close()


def _on_gpu(
    config: RuntimeConfig, checkpoint: Checkpoint, report: Progress
) -> tuple[Executor, MemoryPlan] | None:
    """None if there is no GPU and none was asked for."""
    from engine_runtime.executors.tensorrt.factory import create_gpu_executor, open_gpu

    device = open_gpu(is_required=config.device == "cuda")
    if device is None:
        return None
    return create_gpu_executor(config, device, checkpoint.config, checkpoint, report)


def _needs_gpu(config: RuntimeConfig) -> bool:
    """Whether the user has asked for what only a GPU does."""
    return (
        config.device == "cuda"
        or config.dtype == "bfloat16"
        or config.quantization != "auto"
        or config.kv_cache_dtype != "auto"
    )


def _wants_gpu(config: RuntimeConfig) -> bool:
    """Whether to look for a GPU: never without the packages that are needed to use one."""
    if config.device == "cpu":
        return False
    # Other packages put things into the namespace "cuda" as well.
    is_installed = (
        importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
    )
    if config.device == "cuda" and not is_installed:
        raise DeviceError("--device cuda needs more packages: pip install 'inflightd[gpu]'")
    # The arithmetic of a CPU was asked for by name.
    return is_installed and (config.device == "cuda" or config.dtype not in ("float32", "int8"))
