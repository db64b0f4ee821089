"""int8 matrices in the order in which ``packed_product`` reads them.

    tile of 16 outputs = 16 offsets, int32 | for each 4 inputs: [16 outputs, 4 inputs], int8

The offset is -128 times the sum of an output's weights, for the zero point of the uint8 rows.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from engine_runtime.executors.onnxruntime.decoder_graph import DecoderGraph
from engine_runtime.executors.onnxruntime.packed_product import DEPTH, has_packed_product
from engine_runtime.executors.onnxruntime.quantization import ZERO_POINT
from engine_runtime.kernels.cpu_simd import LANES


def packed_bytes(graph: DecoderGraph) -> int:
    """Size of a graph's packed matrices; 0 where not all are int8, or the processor cannot multiply them."""
    matrices = [weight for weight in graph.weights.values() if len(weight.shape) > 1]
    if not has_packed_product() or any(weight.form != "int8" for weight in matrices):
        return 0
    return sum(_size(*weight.shape) for weight in matrices)


def _size(num_inputs: int, num_outputs: int) -> int:
    return num_outputs * (4 + num_inputs)


class PackedWeights:
    """Packed matrices one after the other, in the order in which they are added.

    They lie in huge pages where the system has them: a step reads all of them, and small pages cost it a
    tenth.
    """

    def __init__(self, num_bytes: int) -> None:
        """Reserves room for matrices of ``num_bytes`` in all."""
        memory = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(memory, np.uint8)
        self._used = 0
        self._addresses: dict[str, int] = {}

    def add(self, name: str, weight: npt.NDArray[np.int8]) -> None:
        """Packs a matrix, C-contiguous [out, in]; both extents are multiples of 16."""
        outputs, inputs = weight.shape
        tiles = outputs // LANES
        size = _size(inputs, outputs)
        place = self._bytes[self._used : self._used + size].view(np.int32).reshape(tiles, -1, LANES)
        place[:, 0] = weight.sum(axis=1, dtype=np.int32).reshape(tiles, LANES) * -ZERO_POINT
        fours = weight.view(np.int32).reshape(tiles, LANES, inputs // DEPTH)
        place[:, 1:] = fours.transpose(0, 2, 1)
        self._addresses[name] = self._bytes.ctypes.data + self._used
        self._used += size

    def address(self, name: str) -> int:
        return self._addresses[name]
