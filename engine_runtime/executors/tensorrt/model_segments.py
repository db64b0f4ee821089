"""The segments of one model on one GPU: the form of each one's weights, what computes it, for which sizes."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from engine_runtime.cuda import CudaDevice, Stream
from engine_runtime.executors.tensorrt.background_builds import BackgroundBuilds, buckets_ready
from engine_runtime.executors.tensorrt.buckets import Buckets, decode_buckets, token_buckets
from engine_runtime.executors.tensorrt.decoder import DeviceDecoder
from engine_runtime.executors.tensorrt.engine_cache import EngineCache
from engine_runtime.executors.tensorrt.kept_segments import kept_segments
from engine_runtime.executors.tensorrt.kernel_forms import Quantization, projections
from engine_runtime.executors.tensorrt.kernel_segment import UnsupportedSegmentError
from engine_runtime.executors.tensorrt.tactics import SegmentFactory
from engine_runtime.executors.tensorrt.tuning import TUNING_SECONDS, TuningSpace, tune, tuned_counts
from engine_runtime.executors.tensorrt.weight_plan import WeightPlan
from engine_runtime.kernels.kernel_library import KernelLibrary
from engine_runtime.model_config import ModelConfig
from engine_runtime.models.segment import SegmentKind
from engine_runtime.runtime_config import Progress, RuntimeConfig, UnsupportedDeviceError
from engine_runtime.weights.checkpoint import Checkpoint

_logger = logging.getLogger(__name__)
_BODY: tuple[SegmentKind, ...] = ("first", "middle")
_ALL: tuple[SegmentKind, ...] = (*_BODY, "last")


class ModelSegments:
    """What makes all segments of a model.

    Attributes:
        plan: of the weights.
        factories: for each form that weights have.
        workspace_bytes: of the segment that needs most.
    """

    def __init__(
        self,
        model: ModelConfig,
        device: CudaDevice,
        library: KernelLibrary,
        plan: WeightPlan,
        max_tokens: int,
        max_rows: int,
    ) -> None:
        """
        Args:
            max_tokens: of one run.
            max_rows: of logits in one run.

        Raises:
            UnsupportedSegmentError: no kernels compute the form of the weights.
            TensorRTError: TensorRT is needed and cannot compute a segment.
        """
        self._model = model
        self._device = device
        self.plan = plan
        self._rows = decode_buckets(max_rows)
        self._tokens = token_buckets(max_tokens)
        forms: tuple[Quantization, ...] = ("none", "fp8")
        self.factories = {
            form: SegmentFactory(model, device, EngineCache(), library, quantization=form)
            for form in forms
            if plan.kinds_of(form)
        }
        bodies = sorted({*self._tokens, *self._rows})
        self.workspace_bytes = max(
            factory.workspace_bytes(kind, self._rows if kind == "last" else bodies)
            for factory, kind in self._parts(_ALL)
        )

    def describe(self) -> str | None:
        """How the weights are quantized; None if they are not."""
        segments = range(-1, self._model.num_hidden_layers)
        quantized = sum(self.plan.quantization_of(segment) == "fp8" for segment in segments)
        if quantized == 0:
            return None
        some = f" in {quantized} of {len(segments)} segments" if quantized < len(segments) else ""
        return f"fp8 weights{some}"

    def tune(self, decoder: DeviceDecoder, stream: Stream, report: Progress) -> None:
        """Finds the fastest way to compute each segment, unless an earlier start has."""
        last = self._model.num_hidden_layers - 1
        smallest = min(shape.n * shape.k for shape in projections(self._model, "middle").values())
        deadline = time.monotonic() + TUNING_SECONDS
        for form, factory in self.factories.items():
            count = -(-2 * self._device.properties.l2_cache // (smallest * (1 if form == "fp8" else 2)))
            layers = [layer for layer in range(last) if self.plan.quantization_of(layer) == form]
            lasts = [last] if self.plan.quantization_of(last) == form else []
            space = TuningSpace(
                {
                    "middle": [decoder.segment_addresses(layer) for layer in layers[:count]],
                    "last": [decoder.segment_addresses(layer) for layer in lasts],
                },
                decoder.workspace,
            )
            counts = tuned_counts(self._rows, self._tokens)
            tune(factory, counts, space, stream, deadline, lambda done, size: report("tuning", done, size))

    def buckets(self) -> tuple[Buckets, Buckets, BackgroundBuilds]:
        """Of decode steps, of others, and what builds those that are missing."""
        rows = buckets_ready(self._parts(_ALL), self._rows)
        tokens = buckets_ready(self._parts(_BODY), self._tokens)
        wanted = [(rows, self._parts(_ALL)), (tokens, self._parts(_BODY))]
        return rows, tokens, BackgroundBuilds(wanted, self._device.make_current)

    def close(self) -> None:
        """Frees what TensorRT has loaded; before the device is closed."""
        for factory in self.factories.values():
            factory.close()

    def _parts(self, kinds: Collection[SegmentKind]) -> list[tuple[SegmentFactory, SegmentKind]]:
        return [
            (factory, kind)
            for form, factory in self.factories.items()
            for kind in self.plan.kinds_of(form)
            if kind in kinds
        ]


def choose_segments(
    config: RuntimeConfig,
    model: ModelConfig,
    device: CudaDevice,
    library: KernelLibrary,
    checkpoint: Checkpoint | None,
    max_tokens: int,
    max_rows: int,
) -> ModelSegments:
    """The segments with weights in the form that was asked for.

    Raises:
        UnsupportedDeviceError: FP8 was asked for, and no kernels compute it here.
        UnsupportedSegmentError, TensorRTError: as of ``ModelSegments``.
    """
    holds_fp8 = checkpoint is not None and checkpoint.holds_fp8
    if config.quantization == "fp8" or (config.quantization == "auto" and holds_fp8):
        plan = WeightPlan(model, quantization="fp8", kept=kept_segments(model, checkpoint))
        try:
            return ModelSegments(model, device, library, plan, max_tokens, max_rows)
        except UnsupportedSegmentError as error:
            if config.quantization == "fp8":
                raise UnsupportedDeviceError(
                    f"--quantization fp8: {error} in FP8 on this GPU; --quantization none does without"
                ) from error
            _logger.warning("the checkpoint's FP8 weights become bfloat16: %s in FP8 on this GPU", error)
    return ModelSegments(model, device, library, WeightPlan(model), max_tokens, max_rows)
