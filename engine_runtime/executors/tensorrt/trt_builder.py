"""From the graph of a segment to a serialized TensorRT engine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from engine_runtime.executors.tensorrt.library import TensorRTError, tensorrt, tensorrt_log
from engine_runtime.models.segment import Segment

ComputeCapability = tuple[int, int]


class TrtBuilder:
    """Compiles segments: strongly typed, one static token count, weights as inputs.

    TensorRT's builder holds no lock of Python's while it works, so building in a thread of its own leaves the
    others running. One build at a time; further threads wait.
    """

    def __init__(self, targets: Sequence[ComputeCapability] | None = None) -> None:
        """
        Args:
            targets: compute capabilities to build for, which needs no GPU; None: the current GPU.

        Raises:
            TensorRTError: TensorRT is not installed or does not know a target.
        """
        trt = tensorrt()
        self._log = tensorrt_log()
        self._builder = trt.Builder(self._log.listener)
        self._lock = threading.Lock()
        if targets is None:
            self._targets = [getattr(trt, "ComputeCapability", None) and trt.ComputeCapability.CURRENT]
        else:
            self._targets = [_named_capability(target) for target in targets]

    def build(self, segment: Segment) -> bytes:
        """Compiles a segment; takes 0.3 to 1 s.

        Args:
            segment: of a static token count.

        Raises:
            ValueError: the token count is open.
            TensorRTError: the graph cannot be compiled.
        """
        if segment.num_tokens is None:
            raise ValueError("an engine has one token count, and this segment leaves it open")
        with self._lock:
            return self._build(segment.model.SerializeToString())

    def _build(self, model: bytes) -> bytes:
        trt = tensorrt()
        flags = trt.NetworkDefinitionCreationFlag
        # TensorRT 11 knows strongly typed networks only, and may drop the flag.
        strongly_typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
        network = self._builder.create_network(strongly_typed)
        parser = trt.OnnxParser(network, self._log.listener)
        if not parser.parse(model):
            raise TensorRTError(f"TensorRT cannot parse a segment: {self._log.take_errors()}")
        config = self._builder.create_builder_config()
        if self._targets[0] is not None:
            config.num_compute_capabilities = len(self._targets)
            for i, target in enumerate(self._targets):
                config.set_compute_capability(target, i)
        trt_engine = self._builder.build_serialized_network(network, config)
        if trt_engine is None:
            raise TensorRTError(f"TensorRT cannot compile a segment: {self._log.take_errors()}")
        return bytes(trt_engine)


def _named_capability(target: ComputeCapability) -> Any:
    known = getattr(tensorrt(), "ComputeCapability", None)
    name = f"SM{target[0]}{target[1]}"
    if not hasattr(known, name):
        raise TensorRTError(f"this TensorRT builds for the GPU that it runs on, not for {name}")
    return getattr(known, name)
