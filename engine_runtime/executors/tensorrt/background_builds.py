"""Builds what TensorRT must compute while the daemon already serves with larger buckets."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from engine_runtime.executors.tensorrt.buckets import Buckets
from engine_runtime.executors.tensorrt.library import TensorRTError
from engine_runtime.models.segment import SegmentKind

_logger = logging.getLogger(__name__)


class EngineSource(Protocol):
    """What ``SegmentFactory`` offers to a thread that prepares for others."""

    def is_ready(self, kind: SegmentKind, num_tokens: int) -> bool: ...

    def prepare(self, kind: SegmentKind, num_tokens: int) -> None: ...


Parts = Sequence[tuple[EngineSource, SegmentKind]]
"""What a step consists of."""


def buckets_ready(parts: Parts, all_buckets: Sequence[int]) -> Buckets:
    """The buckets, of which those are missing whose engines must still be built; never the largest."""
    missing = [
        bucket
        for bucket in all_buckets[:-1]
        if not all(source.is_ready(kind, bucket) for source, kind in parts)
    ]
    return Buckets(all_buckets, missing)


class BackgroundBuilds:
    """A thread that prepares missing buckets, those first that steps asked for, then the smallest."""

    def __init__(self, wanted: Sequence[tuple[Buckets, Parts]], start: Callable[[], None]) -> None:
        """
        Args:
            wanted: buckets, and what each of them needs.
            start: called first in the thread, to make the device current.
        """
        self._wanted = wanted
        self._start = start
        self._failed: set[tuple[int, int]] = set()
        self._is_closing = False
        self._thread: threading.Thread | None = None
        if self._next() is not None:
            self._thread = threading.Thread(target=self._run, name="build-engines", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Returns when there is nothing left to build."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Ends after the engine that is being built, a second at most."""
        self._is_closing = True
        self.wait()

    def _next(self) -> tuple[int, int] | None:
        """(index in ``wanted``, bucket) of the greatest need."""
        waiting = [
            (-needs, bucket, index)
            for index, (buckets, _) in enumerate(self._wanted)
            for needs, bucket in buckets.missing
            if (index, bucket) not in self._failed
        ]
        if not waiting:
            return None
        _, bucket, index = min(waiting)
        return index, bucket

    def _run(self) -> None:
        self._start()
        while not self._is_closing and (found := self._next()) is not None:
            index, bucket = found
            buckets, parts = self._wanted[index]
            try:
                for source, kind in parts:
                    source.prepare(kind, bucket)
            except TensorRTError as error:
                self._failed.add(found)
                _logger.warning("steps of %d tokens are padded to the next size: %s", bucket, error)
                continue
            buckets.add(bucket)
