"""Makes the executor for a model."""

from __future__ import annotations

import importlib.util
import logging

from engine_runtime.executors.memory_plan import MemoryPlan, MemoryPlanError
from engine_runtime.runtime_config import DeviceError, Progress, RuntimeConfig
from engine_runtime.weights.checkpoint import open_checkpoint
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
            from engine_runtime.executors.tensorrt.factory import create_gpu_executor, open_gpu

            device = open_gpu(is_required=config.device == "cuda")
            if device is not None:
                return create_gpu_executor(config, device, checkpoint.config, checkpoint, report)
        from engine_runtime.executors.onnxruntime.factory import create_cpu_executor

        return create_cpu_executor(config, checkpoint, report)
    finally:
        checkpoint.close()


def _wants_gpu(config: RuntimeConfig) -> bool:
    """Whether to look for a GPU: never without the packages that are needed to use one."""
    if config.device == "cpu":
        return False
    is_installed = importlib.util.find_spec("cuda") is not None
    if config.device == "cuda" and not is_installed:
        raise DeviceError("--device cuda needs more packages: pip install 'inflightd[gpu]'")
    # The arithmetic of a CPU was asked for by name.
    return is_installed and (config.device == "cuda" or config.dtype not in ("float32", "int8"))
