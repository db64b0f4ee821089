"""A compiled segment on the device, ready to be run with the weights of any layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

from engine_runtime.cuda import Stream
from engine_runtime.executors.tensorrt.library import TensorRTError, tensorrt, tensorrt_log


class BoundSegment(Protocol):
    """A segment with the addresses of all its inputs, weights and outputs."""

    def enqueue(self, stream: Stream) -> None:
        """Puts one run into the stream. May be captured in a CUDA graph."""
        ...


class DeviceSegment(Protocol):
    """One way to compute a segment for one token count; the same for all layers.

    Attributes:
        num_tokens: rows of all inputs and outputs.
        workspace_bytes: device memory that a run needs besides inputs and outputs.
    """

    @property
    def num_tokens(self) -> int: ...

    @property
    def workspace_bytes(self) -> int: ...

    def use_workspace(self, address: int) -> None:
        """Sets the memory for intermediate results, 256-byte aligned, before the first ``bind``.

        Segments that never run at the same time may share it.
        """
        ...

    def bind(self, addresses: Mapping[str, int]) -> BoundSegment:
        """The segment at device addresses by tensor name, 16-byte aligned. Others in the mapping are ignored.

        Raises:
            KeyError: a tensor of the segment is missing.
        """
        ...


class TrtSegment:
    """A segment that TensorRT runs: one engine, one execution context."""

    def __init__(self, trt_engine: bytes, num_tokens: int, compiled_kernels: bytes | None = None) -> None:
        """
        Args:
            trt_engine: serialized, for this GPU and this version of TensorRT.
            compiled_kernels: what ``compiled_kernels`` gave on an earlier start. Of another GPU or driver,
                it is ignored.

        Raises:
            TensorRTError: the engine does not run here.
        """
        trt = tensorrt()
        log = tensorrt_log()
        self.num_tokens = num_tokens
        self._log = log
        self._trt_engine = _runtime().deserialize_cuda_engine(trt_engine)
        if self._trt_engine is None:
            raise TensorRTError(f"TensorRT cannot load an engine: {log.take_errors()}")
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._runtime_cache: Any = None
        self.had_compiled_kernels = False
        config = self._trt_engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if hasattr(config, "create_runtime_cache"):  # TensorRT for RTX compiles kernels when it loads
            self._runtime_cache = config.create_runtime_cache()
            if compiled_kernels is not None:
                self.had_compiled_kernels = bool(self._runtime_cache.deserialize(compiled_kernels))
            config.set_runtime_cache(self._runtime_cache)
        self._context = self._trt_engine.create_execution_context(config)
        if self._context is None:
            raise TensorRTError(f"TensorRT cannot prepare an engine: {log.take_errors()}")
        self.workspace_bytes = int(self._trt_engine.device_memory_size_v2)
        names = [self._trt_engine.get_tensor_name(i) for i in range(self._trt_engine.num_io_tensors)]
        self._names: tuple[str, ...] = tuple(names)
        self._bound: tuple[int, ...] = (0,) * len(names)

    def compiled_kernels(self) -> bytes | None:
        """What the next start can load instead of compiling; None if TensorRT keeps everything in the engine.

        Complete only after the first run.
        """
        return None if self._runtime_cache is None else bytes(self._runtime_cache.serialize())

    def use_workspace(self, address: int) -> None:
        if self.workspace_bytes:
            self._context.set_device_memory(address, self.workspace_bytes)

    def bind(self, addresses: Mapping[str, int]) -> BoundTrtSegment:
        return BoundTrtSegment(self, tuple(addresses[name] for name in self._names))

    def run(self, addresses: tuple[int, ...], stream: Stream) -> None:
        """Enqueues a run.

        Args:
            addresses: in the engine's order.

        Raises:
            TensorRTError: TensorRT refused.
        """
        context = self._context
        for name, address, old in zip(self._names, addresses, self._bound, strict=True):
            if address != old:
                context.set_tensor_address(name, address)
        self._bound = addresses
        if not context.execute_async_v3(stream.handle):
            raise TensorRTError(f"TensorRT cannot run an engine: {self._log.take_errors()}")


class BoundTrtSegment:
    """Addresses to be set before the shared execution context runs."""

    def __init__(self, segment: TrtSegment, addresses: tuple[int, ...]) -> None:
        self._segment = segment
        self._addresses = addresses

    def enqueue(self, stream: Stream) -> None:
        self._segment.run(self._addresses, stream)


@cache
def _runtime() -> Any:
    return tensorrt().Runtime(tensorrt_log().listener)
