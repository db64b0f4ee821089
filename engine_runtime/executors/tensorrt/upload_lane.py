"""A thread's own way for weights to a device: a stream and two page-locked buffers.

One buffer is filled while the other is copied. What is to be quantized goes to device memory first, and from
there by a kernel.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence

from engine_runtime.cuda import CudaDevice, DeviceBuffer, Event, PinnedBuffer, Stream
from engine_runtime.executors.tensorrt.weight_pieces import Piece
from engine_runtime.executors.tensorrt.weight_plan import Fp8Rows
from engine_runtime.kernels.kernel_library import Kernel


class RowQuantizer:
    """Rounds rows of 16-bit numbers to E4M3, on the device. May be used by several threads."""

    def __init__(self, kernel: Kernel, address: int) -> None:
        """
        Args:
            kernel: ``quantize_rows``.
            address: device memory that offsets count from.
        """
        self._kernel = kernel
        self._address = address
        self._lock = threading.Lock()

    def enqueue(self, stream: Stream, source: int, rows: Fp8Rows) -> None:
        """Enqueues that ``rows`` are made of the numbers at ``source`` in device memory."""
        values, scales = self._address + rows.offset, self._address + rows.scale_offset
        with self._lock:  # a kernel is used by one thread at a time
            self._kernel.launch((rows.num_rows, 1, 1), stream, source, values, scales, rows.columns)


class UploadLane:
    """Implements ``Lane``; made by ``upload_lane``."""

    def __init__(
        self,
        address: int,
        stream: Stream,
        buffers: Sequence[tuple[PinnedBuffer, Event]],
        rounding: tuple[RowQuantizer, DeviceBuffer] | None,
    ) -> None:
        self._address = address
        self._stream = stream
        self._buffers = itertools.cycle(buffers)
        self._rounding = rounding

    def take(self, piece: Piece) -> None:
        buffer, is_free = next(self._buffers)
        is_free.synchronize()
        piece.read_into(buffer.array[: piece.num_bytes])
        if isinstance(piece.place, int):
            self._stream.copy_to_device(self._address + piece.place, buffer.address, piece.num_bytes)
        elif self._rounding is not None:
            quantizer, unquantized = self._rounding
            self._stream.copy_to_device(unquantized.address, buffer.address, piece.num_bytes)
            quantizer.enqueue(self._stream, unquantized.address, piece.place)
        else:
            raise ValueError("weights are to be quantized, and there is no kernel for it")
        is_free.record(self._stream)


@contextlib.contextmanager
def upload_lane(
    device: CudaDevice, address: int, buffer_bytes: int, quantizer: RowQuantizer | None
) -> Iterator[UploadLane]:
    """Opens a lane for the calling thread. At the end waits for all copies and gives everything back.

    Args:
        address: device memory that offsets count from.
        buffer_bytes: of the largest piece.
        quantizer: needed for pieces that are quantized.

    Raises:
        CudaError: host memory cannot be locked, there is no device memory left, or a copy failed.
    """
    device.make_current()
    with contextlib.ExitStack() as undo:  # last made, first freed
        stream = Stream()
        undo.callback(stream.close)
        buffers = []
        for _ in range(2):
            pinned = PinnedBuffer(buffer_bytes)
            undo.callback(pinned.free)
            is_free = Event()
            undo.callback(is_free.close)
            buffers.append((pinned, is_free))
        rounding = None
        if quantizer is not None:
            unquantized = DeviceBuffer(buffer_bytes)
            undo.callback(unquantized.free)
            rounding = quantizer, unquantized
        undo.callback(stream.synchronize)
        yield UploadLane(address, stream, buffers, rounding)
