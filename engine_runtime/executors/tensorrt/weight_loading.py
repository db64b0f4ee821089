"""Brings a checkpoint's weights to where they belong, in several threads.

Each thread takes pieces through a lane of its own: nothing but the list of pieces is shared. While one thread
reads or converts, the copies of others are under way.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Protocol

from engine_runtime.executors.tensorrt.weight_pieces import Piece, largest_piece, pieces_of
from engine_runtime.executors.tensorrt.weight_plan import StoredTensor, WeightPlan
from engine_runtime.weights.checkpoint import Checkpoint

Progress = Callable[[int, int], None]
"""Called with (bytes that are done, bytes in all), as they lie on the device."""

_PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# 16 GB from the page cache on an H200 with 16 cores: 0.73 s with 4 threads, 0.44, 0.39, 0.46 with 8, 12, 16.
_THREADS = min(12, _PROCESSORS)
_READ_AHEAD = min(8, _PROCESSORS)  # tensors, of those that are computed
_PROGRESS_SECONDS = 0.05


class Lane(Protocol):
    """Brings pieces to the device, one after another; used by one thread."""

    def take(self, piece: Piece) -> None:
        """Reads a piece and stores it, or what is to be made of it, at its place.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        ...


OpenLane = Callable[[int], AbstractContextManager[Lane]]
"""Called in each thread with the bytes of the largest piece; everything is stored when the context ends."""


class _SharedPieces:
    """Pieces for several threads, until there are no more or one thread fails.

    Attributes:
        stored_bytes: of the pieces that are done.
        error: the first one, if a thread failed.
    """

    def __init__(self, pieces: Iterator[Piece]) -> None:
        self.stored_bytes = 0
        self.error: BaseException | None = None
        self._pieces = pieces
        self._lock = threading.Lock()

    def carry(self, open_lane: Callable[[], AbstractContextManager[Lane]]) -> None:
        """Takes pieces through a lane until none is left; the work of one thread."""
        try:
            with open_lane() as lane:
                while (piece := self._next()) is not None:
                    lane.take(piece)
                    with self._lock:
                        self.stored_bytes += piece.stored_bytes
        except BaseException as error:
            self.stop(error)

    def stop(self, error: BaseException | None = None) -> None:
        """Gives no more pieces to any thread."""
        with self._lock:
            self._pieces = iter(())
            self.error = self.error or error

    def _next(self) -> Piece | None:
        with self._lock:
            return next(self._pieces, None)


def load_weights(
    plan: WeightPlan,
    checkpoint: Checkpoint,
    open_lane: OpenLane,
    progress: Progress | None = None,
    *,
    num_threads: int = _THREADS,
    piece_bytes: int | None = None,
) -> None:
    """Brings all tensors of the plan to their places, and waits.

    Tensors that must be computed (GGUF's quantized ones) are computed ahead, a few at a time.

    Args:
        progress: called in this thread, several times a second and at the end.
        num_threads: at most.
        piece_bytes: as in ``pieces_of``; None: what is fast.

    Raises:
        CheckpointError: a tensor has a type that is not supported, or a file cannot be read or has become
            shorter. Any other error of a thread is raised as well; all threads have ended then.
    """
    total = sum(tensor.num_bytes + tensor.scale_bytes for tensor in plan.tensors)
    size = piece_bytes or largest_piece(plan)
    count = max(1, min(num_threads, -(-total // size)))
    with (
        ThreadPoolExecutor(_READ_AHEAD, "read-weights") as readers,
        ThreadPoolExecutor(count, "load-weights") as loaders,
    ):
        pieces = _SharedPieces(_pieces(readers, plan, checkpoint, size))
        try:
            jobs = [loaders.submit(pieces.carry, lambda: open_lane(size)) for _ in range(count)]
            while wait(jobs, _PROGRESS_SECONDS).not_done:
                if progress is not None:
                    progress(pieces.stored_bytes, total)
        finally:
            pieces.stop()
    if pieces.error is not None:
        raise pieces.error
    if progress is not None:
        progress(total, total)


def _pieces(
    readers: ThreadPoolExecutor, plan: WeightPlan, checkpoint: Checkpoint, piece_bytes: int
) -> Iterator[Piece]:
    """Of all tensors in the plan's order; the next ones are read, or computed, while these are given."""

    def read(tensor: StoredTensor) -> Future[list[Piece]]:
        return readers.submit(pieces_of, tensor, checkpoint, piece_bytes)

    tensors = iter(plan.tensors)
    ahead = deque(read(tensor) for tensor in itertools.islice(tensors, _READ_AHEAD))
    while ahead:
        pieces = ahead.popleft().result()
        ahead.extend(read(tensor) for tensor in itertools.islice(tensors, 1))
        yield from pieces
