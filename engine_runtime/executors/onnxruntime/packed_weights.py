"""int8 matrices in the order in which ``packed_product`` reads them.

    tile of 16 outputs = 16 offsets, int32 | for each 4 inputs: [16 outputs, 4 inputs], int8

The tiles of a merged gate and up projection take turns, so that both halves of a product come together. The
offset is -128 times the sum of an output's weights, for the zero point of the uint8 rows.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from engine_runtime.executors.onnxruntime.amx_tiles import DEPTH as TILE_DEPTH
from engine_runtime.executors.onnxruntime.amx_tiles import has_tiles
from engine_runtime.executors.onnxruntime.decoder_graph import DecoderGraph
from engine_runtime.executors.onnxruntime.quantization import ZERO_POINT
from engine_runtime.executors.onnxruntime.vnni_tiles import DEPTH, has_vnni
from engine_runtime.kernels.cpu_simd import LANES


def packed_bytes(graph: DecoderGraph) -> int:
    """Size of a graph's packed matrices; 0 where not all are int8, or the processor cannot multiply them."""
    matrices = matrices_of(graph)
    if not has_vnni() or any(graph.weights[name].form != "int8" for name in matrices):
        return 0
    return sum(_size(*shape) for shape in matrices.values())


def suits_tiles(graph: DecoderGraph) -> bool:
    """Whether the packed product is the faster one for steps of any size."""
    return has_tiles() and all(shape[0] % TILE_DEPTH == 0 for shape in matrices_of(graph).values())


def matrices_of(graph: DecoderGraph) -> dict[str, tuple[int, ...]]:
    """Names and shapes [in, out] of a graph's matrices."""
    return {name: weight.shape for name, weight in graph.weights.items() if len(weight.shape) > 1}


def _size(num_inputs: int, num_outputs: int) -> int:
    return num_outputs * (4 + num_inputs)


class PackedWeights:
    """Packed matrices one after the other, in the order in which they are named.

    They lie in huge pages where the system has them: a step reads all of them, and small pages cost it a
    tenth.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Reserves room for matrices [in, out]; both extents are multiples of 16."""
        self._places: dict[str, slice] = {}
        num_bytes = 0
        for name, shape in shapes.items():
            self._places[name] = slice(num_bytes, num_bytes + _size(*shape))
            num_bytes += _size(*shape)
        memory = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(memory, np.uint8)

    def pack(self, name: str, weight: npt.NDArray[np.int8], *, is_gated: bool = False) -> None:
        """Puts a matrix, C-contiguous [out, in], into its place. Several threads may, one a matrix.

        Args:
            is_gated: the first half of the outputs is gate, the second up.
        """
        outputs, inputs = weight.shape
        if is_gated:
            halves = weight.reshape(2, -1, LANES, inputs)
            weight = halves.swapaxes(0, 1).reshape(outputs, inputs)
        tiles = outputs // LANES
        place = self._bytes[self._places[name]].view(np.int32).reshape(tiles, -1, LANES)
        place[:, 0] = weight.sum(axis=1, dtype=np.int32).reshape(tiles, LANES) * -ZERO_POINT
        fours = weight.view(np.int32).reshape(tiles, LANES, inputs // DEPTH)
        place[:, 1:] = fours.transpose(0, 2, 1)

    def address(self, name: str) -> int:
        address: int = self._bytes.ctypes.data
        return address + int(self._places[name].start)
