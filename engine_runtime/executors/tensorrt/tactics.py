"""Which of several ways to compute a segment is fastest on this GPU: timed once, kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cuda.bindings import driver

from engine_runtime.cuda import CudaDevice, Event, Stream, checked
from engine_runtime.executors.tensorrt.engine_cache import (
    CacheKey,
    EngineCache,
    compiled_kernels_key,
    graph_digest,
    segment_key,
)
from engine_runtime.executors.tensorrt.gemm_form import GemmForm, parse_forms
from engine_runtime.executors.tensorrt.kernel_cost import MOST_TIMED
from engine_runtime.executors.tensorrt.kernel_forms import (
    Projection,
    Quantization,
    candidates,
    projections,
)
from engine_runtime.executors.tensorrt.kernel_segment import (
    BoundKernelSegment,
    KernelSegment,
    UnsupportedSegmentError,
)
from engine_runtime.executors.tensorrt.library import TensorRTError, tensorrt_version
from engine_runtime.executors.tensorrt.segment import BoundSegment, DeviceSegment, TrtSegment
from engine_runtime.executors.tensorrt.trt_builder import TrtBuilder
from engine_runtime.kernels.kernel_library import KernelLibrary, KernelsMissingError
from engine_runtime.model_config import ModelConfig
from engine_runtime.models.build import build_segment
from engine_runtime.models.segment import DType, Segment, SegmentKind

_logger = logging.getLogger(__name__)
_REPLAYS = 3
_LEAST_RUNS = 4
_TURNS = 3
_FORM_TURNS = 2

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
    microseconds: Mapping[Formulation, float] = field(default_factory=dict)


class SegmentFactory:
    """Makes segments for one model on one GPU.

    Called by the thread that opened the device, except ``prepare``.

    Attributes:
        quantization: of the weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: CudaDevice,
        cache: EngineCache,
        library: KernelLibrary | None,
        *,
        dtype: DType = "bfloat16",
        quantization: Quantization = "none",
        only: Formulation | None = None,
    ) -> None:
        """
        Args:
            quantization: of the weights; ``fp8`` needs kernels.
            library: our compiled kernels, if there are any for this GPU.
            only: the formulation to use where it can be used, without asking for the fastest.
        """
        self._config = config
        self._device = device
        self._cache = cache
        self._dtype: DType = dtype
        self.quantization: Quantization = quantization
        self._only = only
        self._builder: TrtBuilder | None = None
        can_use_kernels = dtype == "bfloat16" and only != "tensorrt"
        self._library = library if can_use_kernels else None
        self._lock = threading.Lock()
        self._trt_segments: dict[tuple[SegmentKind, int], TrtSegment] = {}
        self._graphs: dict[SegmentKind, str] = {}
        self._guesses: dict[tuple[SegmentKind, int], Tactic] = {}
        names = "\n".join(sorted(library.names)) if library is not None else ""
        self._library_id = hashlib.sha256(names.encode()).hexdigest()[:16]
        major, minor = device.properties.compute_capability
        self._target = f"sm_{major}{minor}"

    def make(self, kind: SegmentKind, num_tokens: int, tactic: Tactic | None = None) -> DeviceSegment:
        """A segment, by the tactic that was found before, or a guess.

        An engine that is not cached yet is built, which takes about a second.

        Raises:
            TensorRTError: TensorRT is needed and cannot compute it.
            UnsupportedSegmentError: the weights are quantized and no kernel computes it.
        """
        tactic = tactic or self.known_tactic(kind, num_tokens) or self._guess(kind, num_tokens)
        if tactic.formulation == "kernels":
            try:
                return self._kernel_segment(kind, num_tokens, tactic.kernels)
            except UnsupportedSegmentError as error:
                if self.quantization != "none":
                    raise
                _logger.info("TensorRT computes %s segments of %d tokens: %s", kind, num_tokens, error)
        return self._trt_segment(kind, num_tokens)

    def is_ready(self, kind: SegmentKind, num_tokens: int) -> bool:
        """Whether ``make`` takes a moment only: kernels compute it, or its engine is loaded."""
        return (kind, num_tokens) in self._trt_segments or not self._needs_tensorrt(kind, num_tokens)

    def prepare(self, kind: SegmentKind, num_tokens: int) -> None:
        """Builds and loads the engine that ``make`` would build, if any.

        May be called by another thread to which the device is current; it leaves Python to the others while
        it builds.

        Raises:
            TensorRTError: it cannot be built.
        """
        if self._needs_tensorrt(kind, num_tokens):
            self._trt_segment(kind, num_tokens)

    def workspace_bytes(self, kind: SegmentKind, buckets: Sequence[int]) -> int:
        """Device memory for any of these token counts by any choice of kernels.

        Of what TensorRT computes, only the engine of the largest is asked, and built if need be.

        Raises:
            TensorRTError, UnsupportedSegmentError: as of ``make``.
        """
        largest = max(buckets)
        found = [0]
        for num_tokens in buckets:
            if not self._needs_tensorrt(kind, num_tokens):
                widest = self._widest_kernels(kind, num_tokens)
                found.append(self._kernel_segment(kind, num_tokens, widest).workspace_bytes)
            elif num_tokens == largest:
                found.append(self._trt_segment(kind, num_tokens).workspace_bytes)
        return max(found)

    def close(self) -> None:
        """Frees what TensorRT has loaded; before the device is closed."""
        self._trt_segments.clear()

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
                of the GPU. Outputs are overwritten. For ``last``, tune ``middle`` first: what both have is
                not timed again.
            workspace: address and size of memory that is free now.
            with_tensorrt: also build and time an engine; about a second.

        Raises:
            TensorRTError: TensorRT is needed and cannot compute it.
        """
        choices: dict[str, KernelSegment] = {}
        segments: dict[str, DeviceSegment] = {}
        try:
            tuned = self._tune_kernels(kind, num_tokens, layers, workspace, stream)
            choices["tuned"] = self._kernel_segment(kind, num_tokens, tuned)
            # In a segment, products run beside others than those that they were timed with.
            predicted = self._kernel_segment(kind, num_tokens, {})
            if predicted.forms != choices["tuned"].forms:
                choices["predicted"] = predicted
            segments.update(choices)
        except UnsupportedSegmentError:
            if self.quantization != "none":
                raise
            with_tensorrt = True
        if with_tensorrt and self.quantization == "none":
            segments["tensorrt"] = self._trt_segment(kind, num_tokens)
        times = _time_in_turns(segments, layers, workspace, stream)
        kernels: dict[Projection, str] = {}
        microseconds: dict[Formulation, float] = {}
        if timed := [name for name in choices if name in times]:
            best = min(timed, key=lambda name: times[name])
            kernels = {name: form.name for name, form in choices[best].forms.items()}
            microseconds["kernels"] = times[best]
        if "tensorrt" in times:
            microseconds["tensorrt"] = times["tensorrt"]
        fastest = min(microseconds, key=lambda name: microseconds[name])
        entry = {"formulation": fastest, "kernels": kernels, "microseconds": microseconds}
        self._cache.store(self._tactic_key(kind, num_tokens), json.dumps(entry).encode())
        return Tactic(fastest, kernels, microseconds)

    def _needs_tensorrt(self, kind: SegmentKind, num_tokens: int) -> bool:
        tactic = self.known_tactic(kind, num_tokens) or self._guess(kind, num_tokens)
        return tactic.formulation == "tensorrt"

    def _widest_kernels(self, kind: SegmentKind, num_tokens: int) -> dict[Projection, str]:
        """For each projection the form that writes most."""
        widest: dict[Projection, str] = {}
        for projection in projections(self._config, kind):
            forms = self._candidates(kind, projection, num_tokens)
            if forms:
                widest[projection] = max(forms, key=lambda form: form.result_bytes).name
        return widest

    def _candidates(self, kind: SegmentKind, projection: Projection, num_tokens: int) -> list[GemmForm]:
        if self._library is None:
            return []
        known = parse_forms(self._library.names)
        num_multiprocessors = self._device.properties.num_multiprocessors
        return candidates(
            known, self._config, kind, projection, num_tokens, num_multiprocessors, self.quantization
        )

    def _guess(self, kind: SegmentKind, num_tokens: int) -> Tactic:
        guess = self._guesses.get((kind, num_tokens))
        if guess is None:
            guess = Tactic("kernels")
            if self.quantization == "none":
                try:
                    self._kernel_segment(kind, num_tokens, {})
                except UnsupportedSegmentError:
                    guess = Tactic("tensorrt")
            self._guesses[kind, num_tokens] = guess
        return guess

    def _kernel_segment(
        self, kind: SegmentKind, num_tokens: int, choice: Mapping[Projection, str]
    ) -> KernelSegment:
        if self._library is None:
            raise UnsupportedSegmentError("there are no kernels for this GPU, model or type")
        num_multiprocessors = self._device.properties.num_multiprocessors
        return KernelSegment(
            self._config, kind, num_tokens, self._library, num_multiprocessors, choice, self.quantization
        )

    def _trt_segment(self, kind: SegmentKind, num_tokens: int) -> TrtSegment:
        """Loaded once: its execution context serves all that bind it."""
        made = self._trt_segments.get((kind, num_tokens))
        if made is not None:
            return made
        with self._lock:  # whoever loads first; TensorRT's builder and runtime serve one at a time
            made = self._trt_segments.get((kind, num_tokens))
            if made is None:
                made = self._trt_segments[kind, num_tokens] = self._load_trt(kind, num_tokens)
        return made

    def _load_trt(self, kind: SegmentKind, num_tokens: int) -> TrtSegment:
        segment = self._segment(kind, num_tokens)
        key = segment_key(segment, self._target)
        self._builder = self._builder or TrtBuilder()
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
        chosen: dict[Projection, str] = {}
        # Projections that another kind of segment has too are as fast there.
        found = self.known_tactic("middle", num_tokens) if kind == "last" else None
        for projection in projections(self._config, kind):
            if found is not None and projection in found.kernels:
                chosen[projection] = found.kernels[projection]
                continue
            forms: dict[str, list[BoundSegment]] = {}
            for form in self._candidates(kind, projection, num_tokens)[:MOST_TIMED]:
                segment = self._kernel_segment(kind, num_tokens, {**chosen, projection: form.name})
                if segment.workspace_bytes > workspace[1]:
                    continue
                segment.use_workspace(workspace[0])
                try:
                    forms[form.name] = [
                        BoundKernelSegment(segment.parts(layer)[projection]) for layer in layers
                    ]
                except KernelsMissingError:  # its file is gone
                    continue
            if forms:
                times = _measure_in_turns(forms, stream, _FORM_TURNS)
                chosen[projection] = min(times, key=lambda name: times[name])
        return chosen

    def _segment(self, kind: SegmentKind, num_tokens: int) -> Segment:
        return build_segment(self._config, kind, self._dtype, num_tokens)

    def _tactic_key(self, kind: SegmentKind, num_tokens: int) -> CacheKey:
        try:
            version = tensorrt_version()
        except TensorRTError:
            version = "no TensorRT"
        if kind not in self._graphs:  # making a graph takes 17 ms
            self._graphs[kind] = graph_digest(build_segment(self._config, kind, self._dtype))
        return CacheKey(
            content="tactics",
            kind=kind,
            dtype=self._dtype,
            num_tokens=num_tokens,
            graph=self._graphs[kind],
            formulation="any",
            quantization=self.quantization,
            tensor_parallel_size=1,
            library=f"{version}, kernels {self._library_id}",
            target=f"{self._target} {self._device.properties.name}",
        )


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


def _time_in_turns(
    segments: Mapping[str, DeviceSegment],
    layers: Sequence[Mapping[str, int]],
    workspace: tuple[int, int],
    stream: Stream,
) -> dict[str, float]:
    """Microseconds of each; in turns, since a GPU that is warm is slower than one that was idle."""
    bound: dict[str, list[BoundSegment]] = {}
    for name, segment in segments.items():
        if segment.workspace_bytes <= workspace[1]:
            segment.use_workspace(workspace[0])
            bound[name] = [segment.bind(layer) for layer in layers]
    if not bound:
        raise ValueError(f"no way to compute a segment fits into {workspace[1]} bytes of workspace")
    return _measure_in_turns(bound, stream, _TURNS if len(bound) > 1 else 1)


def _measure_in_turns(
    ways: Mapping[str, Sequence[BoundSegment]], stream: Stream, turns: int
) -> dict[str, float]:
    """Microseconds of each, the median of its turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, runs in ways.items():
            times[name].append(measure(runs, stream))
    return {name: sorted(found)[(len(found) - 1) // 2] for name, found in times.items()}
