"""Which of several ways to compute a segment is fastest on this GPU: timed once, kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cuda.bindings import driver

from engine_runtime.cuda import CudaDevice, Event, Stream, checked
from engine_runtime.executors.tensorrt_cache import (
    CacheKey,
    EngineCache,
    compiled_kernels_key,
    segment_key,
)
from engine_runtime.executors.tensorrt_kernel_forms import (
    Projection,
    candidates,
    is_computable,
    parse_forms,
    projections,
)
from engine_runtime.executors.tensorrt_kernel_segment import (
    BoundKernelSegment,
    KernelSegment,
    UnsupportedSegmentError,
)
from engine_runtime.executors.tensorrt_segment import BoundSegment, DeviceSegment, TrtSegment
from engine_runtime.executors.trt_builder import TrtBuilder
from engine_runtime.kernels.kernel_library import KernelLibrary
from engine_runtime.model_config import ModelConfig
from engine_runtime.models.build import build_segment
from engine_runtime.models.segment import DType, Segment, SegmentKind

_logger = logging.getLogger(__name__)
_REPLAYS = 3
_LEAST_RUNS = 4

Formulation = Literal["kernels", "tensorrt"]


@dataclass(frozen=True)
class Tactic:
    """How to compute a segment.

    Attributes:
        kernels: for the formulation of that name, the matrix product of each projection.
        microseconds: of each formulation that was timed.
    """

    formulation: Formulation
    kernels: Mapping[Projection, str] = field(default_factory=dict)
    microseconds: Mapping[str, float] = field(default_factory=dict)


class SegmentFactory:
    """Makes segments for one model on one GPU.

    Called by the thread that opened the device.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: CudaDevice,
        cache: EngineCache,
        library: KernelLibrary | None,
        *,
        dtype: DType = "bfloat16",
        only: Formulation | None = None,
    ) -> None:
        """
        Args:
            library: our compiled kernels, if there are any for this GPU.
            only: the formulation to use where it can be used, without asking for the fastest.
        """
        self._config = config
        self._device = device
        self._cache = cache
        self._dtype: DType = dtype
        self._only = only
        self._builder: TrtBuilder | None = None
        can_use_kernels = dtype == "bfloat16" and only != "tensorrt" and is_computable(config)
        self._library = library if can_use_kernels else None
        names = "\n".join(sorted(library.names)) if library is not None else ""
        self._library_id = hashlib.sha256(names.encode()).hexdigest()[:16]
        major, minor = device.properties.compute_capability
        self._target = f"sm_{major}{minor}"

    def make(self, kind: SegmentKind, num_tokens: int, tactic: Tactic | None = None) -> DeviceSegment:
        """A segment, by the tactic that was found before, or a guess.

        An engine that is not cached yet is built, which takes about a second.

        Raises:
            TensorRTError: TensorRT is needed and cannot compute it.
        """
        tactic = tactic or self.known_tactic(kind, num_tokens) or self._guess()
        if tactic.formulation == "kernels":
            try:
                return self._kernel_segment(kind, num_tokens, tactic.kernels)
            except UnsupportedSegmentError as error:
                _logger.info("TensorRT computes %s segments of %d tokens: %s", kind, num_tokens, error)
        return self._trt_segment(kind, num_tokens)

    def known_tactic(self, kind: SegmentKind, num_tokens: int) -> Tactic | None:
        """What ``tune`` found for this shape, now or at an earlier start."""
        entry = self._cache.load(self._tactic_key(kind, num_tokens)) if self._only is None else None
        if entry is None:
            return None
        stored = json.loads(entry)
        return Tactic(stored["formulation"], stored["kernels"], stored["microseconds"])

    def tune(
        self,
        kind: SegmentKind,
        num_tokens: int,
        layers: Sequence[Mapping[str, int]],
        workspace: tuple[int, int],
        stream: Stream,
        *,
        with_tensorrt: bool = True,
    ) -> Tactic:
        """Times what can compute a segment and keeps the fastest.

        Args:
            layers: complete addresses of several layers, whose weights together are larger than the cache
                of the GPU. Outputs are overwritten.
            workspace: address and size of memory that is free now.
            with_tensorrt: also build and time an engine; about a second.

        Raises:
            TensorRTError: TensorRT is needed and cannot compute it.
        """
        microseconds: dict[str, float] = {}
        kernels: dict[Projection, str] = {}
        try:
            kernels = self._tune_kernels(kind, num_tokens, layers, workspace, stream)
            segment = self._kernel_segment(kind, num_tokens, kernels)
            microseconds["kernels"] = _time_segment(segment, layers, workspace, stream)
        except UnsupportedSegmentError:
            with_tensorrt = True
        if with_tensorrt:
            trt_segment = self._trt_segment(kind, num_tokens)
            microseconds["tensorrt"] = _time_segment(trt_segment, layers, workspace, stream)
        fastest: Formulation = (
            "kernels" if microseconds.get("kernels", 1e9) <= microseconds.get("tensorrt", 1e9) else "tensorrt"
        )
        tactic = Tactic(fastest, kernels, microseconds)
        entry = {"formulation": fastest, "kernels": kernels, "microseconds": microseconds}
        self._cache.store(self._tactic_key(kind, num_tokens), json.dumps(entry).encode())
        return tactic

    def _guess(self) -> Tactic:
        return Tactic("kernels" if self._library is not None else "tensorrt")

    def _kernel_segment(
        self, kind: SegmentKind, num_tokens: int, choice: Mapping[Projection, str]
    ) -> KernelSegment:
        if self._library is None:
            raise UnsupportedSegmentError("there are no kernels for this GPU, model or type")
        num_multiprocessors = self._device.properties.num_multiprocessors
        return KernelSegment(self._config, kind, num_tokens, self._library, num_multiprocessors, choice)

    def _trt_segment(self, kind: SegmentKind, num_tokens: int) -> TrtSegment:
        segment = self._segment(kind, num_tokens)
        key = segment_key(segment, self._target)
        if self._builder is None:
            self._builder = TrtBuilder()
        trt_engine = self._cache.engine(key, lambda: segment, self._builder)
        compiled_key = compiled_kernels_key(key, self._device.properties.name)
        compiled = self._cache.load(compiled_key)
        made = TrtSegment(trt_engine, num_tokens, compiled)
        if not made.had_compiled_kernels and (compiled := made.compiled_kernels()) is not None:
            self._cache.store(compiled_key, compiled)
        return made

    def _tune_kernels(
        self,
        kind: SegmentKind,
        num_tokens: int,
        layers: Sequence[Mapping[str, int]],
        workspace: tuple[int, int],
        stream: Stream,
    ) -> dict[Projection, str]:
        if self._library is None:
            raise UnsupportedSegmentError("there are no kernels for this GPU, model or type")
        known = parse_forms(self._library.names)
        chosen: dict[Projection, str] = {}
        for projection in projections(self._config, kind):
            times = {}
            for form in candidates(known, self._config, kind, projection, num_tokens):
                segment = self._kernel_segment(kind, num_tokens, {**chosen, projection: form.name})
                if segment.workspace_bytes > workspace[1]:
                    continue
                segment.use_workspace(workspace[0])
                bound = [BoundKernelSegment(segment.parts(layer)[projection]) for layer in layers]
                times[form.name] = measure(bound, stream)
            if times:
                chosen[projection] = min(times, key=lambda name: times[name])
        return chosen

    def _segment(self, kind: SegmentKind, num_tokens: int) -> Segment:
        return build_segment(self._config, kind, self._dtype, num_tokens)

    def _tactic_key(self, kind: SegmentKind, num_tokens: int) -> CacheKey:
        key = segment_key(self._segment(kind, num_tokens), f"{self._target} {self._device.properties.name}")
        return replace(key, content="tactics", library=f"{key.library}, kernels {self._library_id}")


def measure(runs: Sequence[BoundSegment], stream: Stream) -> float:
    """Microseconds of one of ``runs``, the median over replays of a CUDA graph that holds them in turn."""
    count = max(1, -(-_LEAST_RUNS // len(runs)))
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    for run in runs:
        run.enqueue(stream)
    stream.synchronize()
    checked(driver.cuStreamBeginCapture(stream.handle, mode))
    for _ in range(count):
        for run in runs:
            run.enqueue(stream)
    graph = checked(driver.cuStreamEndCapture(stream.handle))
    replay = checked(driver.cuGraphInstantiate(graph, 0))
    start, end = Event(times=True), Event(times=True)
    milliseconds = []
    for _ in range(_REPLAYS):
        start.record(stream)
        checked(driver.cuGraphLaunch(replay, stream.handle))
        end.record(stream)
        end.synchronize()
        milliseconds.append(end.milliseconds_since(start))
    _destroy(replay, graph, start, end)
    return sorted(milliseconds)[len(milliseconds) // 2] * 1e3 / (count * len(runs))


def _destroy(replay: Any, graph: Any, *events: Event) -> None:
    checked(driver.cuGraphExecDestroy(replay))
    checked(driver.cuGraphDestroy(graph))
    for event in events:
        event.close()


def _time_segment(
    segment: DeviceSegment, layers: Sequence[Mapping[str, int]], workspace: tuple[int, int], stream: Stream
) -> float:
    address, size = workspace
    if segment.workspace_bytes > size:
        return float("inf")
    segment.use_workspace(address)
    return measure([segment.bind(layer) for layer in layers], stream)
