"""Times the ways to compute each segment at the first start of a model's shape on a GPU.

Before the first request, since what a later choice replaces would be in CUDA graphs already, and a request
that comes meanwhile would wait. Results are kept on disk, so further starts find them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine_runtime.cuda import CudaError, Stream
from engine_runtime.executors.tensorrt.kernel_segment import UnsupportedSegmentError
from engine_runtime.executors.tensorrt.tactics import SegmentFactory
from engine_runtime.models.segment import SegmentKind

_logger = logging.getLogger(__name__)
TUNING_SECONDS = 8.0
"""Of one start; the next one goes on."""
_FEW_TOKENS = 256
_PREFILL_TOKENS = (512, 1024, 2048, 4096, 8192)

Addresses = Mapping[str, int]


@dataclass(frozen=True)
class TuningSpace:
    """Where segments may run while nothing else does.

    Attributes:
        layers: for each kind, complete addresses of some layers: so many that the weights of a product come
            from memory when its turn comes again.
        workspace: address and bytes.
    """

    layers: Mapping[SegmentKind, Sequence[Addresses]]
    workspace: tuple[int, int]


def tuned_counts(
    decode_buckets: Sequence[int], token_buckets: Sequence[int]
) -> list[tuple[SegmentKind, int]]:
    """What is worth timing: decode steps, which most steps are, and some sizes of others."""
    found: list[tuple[SegmentKind, int]] = []
    for bucket in decode_buckets:
        found += [("middle", bucket), ("last", bucket)]
    others = {*_PREFILL_TOKENS, token_buckets[-1]} & {*token_buckets} - {*decode_buckets}
    return found + [("middle", bucket) for bucket in sorted(others)]


def tune(
    segments: SegmentFactory,
    counts: Sequence[tuple[SegmentKind, int]],
    space: TuningSpace,
    stream: Stream,
    deadline: float,
    report: Callable[[int, int], None],
) -> None:
    """Times what is not known yet.

    Args:
        deadline: of ``time.monotonic``; nothing is begun after it.
        report: called with (done, all) if there is anything to do.
    """
    todo = [
        (kind, bucket)
        for kind, bucket in counts
        if space.layers.get(kind)
        and segments.known_tactic(kind, bucket) is None
        and segments.is_ready(kind, bucket)
    ]
    for done, (kind, bucket) in enumerate(todo):
        report(done, len(todo))
        if time.monotonic() > deadline:
            _logger.info("%d of %d sizes of steps are timed at the next start", len(todo) - done, len(todo))
            break
        layers = space.layers[kind]
        if bucket > _FEW_TOKENS:  # arithmetic decides, not memory
            layers = layers[:2]
        try:
            segments.tune(kind, bucket, layers, space.workspace, stream, with_tensorrt=False)
        except (UnsupportedSegmentError, ValueError) as error:
            _logger.debug("%s segments of %d tokens are not timed: %s", kind, bucket, error)
        except CudaError as error:
            if error.is_fatal:
                raise
            _logger.warning("segments are not timed: %s", error)
            break
    if todo:
        report(len(todo), len(todo))
