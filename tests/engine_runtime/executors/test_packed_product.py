"""Our own product against numpy's integers, and the decoder with either product bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from engine_runtime.executors.onnxruntime import packed_product as product
from engine_runtime.executors.onnxruntime.amx_tiles import has_tiles
from engine_runtime.executors.onnxruntime.decoder_graph import DecoderGraph, build_decoder, transpose_weights
from engine_runtime.executors.onnxruntime.decoder_session import DecoderSession
from engine_runtime.executors.onnxruntime.operators import (
    ADDRESSES,
    COLUMNS,
    ROWS,
    SCRATCH,
    SCRATCH_STRIDE,
    compiled,
)
from engine_runtime.executors.onnxruntime.packed_weights import PackedWeights, packed_bytes
from engine_runtime.executors.onnxruntime.quantization import fuse_quantized, quantize_matmuls
from engine_runtime.executors.onnxruntime.vnni_tiles import has_vnni
from engine_runtime.kernels.cpu import StepLayout, allocate_kv_cache
from engine_runtime.weights.checkpoint import Checkpoint, open_checkpoint
from tests.reference.tiny_checkpoints import CONFIGS, write_tiny_checkpoint

pytestmark = pytest.mark.skipif(not has_vnni(), reason="needs a processor with VNNI")

_RNG = np.random.default_rng(0)
_GUARD = 0x5A5A5A5A


def _multiply(
    x: npt.NDArray[np.uint8], weight: npt.NDArray[np.int8], parts: int, least_tiled: int = product.NEVER
) -> npt.NDArray[np.int32]:
    """The kernel's sums; the memory around x's rows and the sums must not matter."""
    (rows, columns), outputs = x.shape, len(weight)
    packed = PackedWeights(dict.fromkeys(("before", "w"), (columns, outputs)))
    packed.pack("w", weight)
    packed.pack("before", _RNG.integers(-127, 128, weight.shape, np.int8))
    sums = np.full((rows + 1, outputs), _GUARD, np.int32)
    arguments = np.zeros(product.WEIGHTS + product.NUM_EXTRA, np.int64)
    arguments[ROWS], arguments[COLUMNS] = rows, columns
    arguments[ADDRESSES : ADDRESSES + 2] = x.ctypes.data, sums.ctypes.data
    arguments[product.WEIGHTS] = packed.address("w")
    arguments[product.OUTPUTS], arguments[product.PARTS] = outputs, parts
    scratch = np.empty((parts, product.SCRATCH_BYTES), np.uint8)
    arguments[SCRATCH], arguments[SCRATCH_STRIDE] = scratch.ctypes.data, scratch.strides[0]
    arguments[product.RESULT] = product.SUMS
    arguments[product.LEAST_TILED] = least_tiled
    arguments[product.NEXT :] = packed.address("before"), columns, outputs
    for part in range(parts):
        compiled(product.packed_product).ctypes(arguments.ctypes.data, part)
    assert (sums[rows] == _GUARD).all()
    return sums[:rows]


@pytest.mark.parametrize("rows", [*range(1, 11), 17, 33])
@pytest.mark.parametrize(("columns", "outputs"), [(16, 16), (48, 80), (576, 96), (1040, 16), (64, 1008)])
def test_sums_are_those_of_integers(rows: int, columns: int, outputs: int) -> None:
    x = _RNG.integers(0, 256, (rows, columns), np.uint8)
    weight = _RNG.integers(-127, 128, (outputs, columns), np.int8)
    exact = (x.astype(np.int64) - 128) @ weight.T.astype(np.int64)
    for parts in (1, 2, 3, 8):
        np.testing.assert_array_equal(_multiply(x, weight, parts), exact)


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_do_not_saturate(value: int, sign: int) -> None:
    x = np.full((3, 4096), value, np.uint8)
    weight = np.full((16, 4096), 127 * sign, np.int8)
    assert (_multiply(x, weight, 2) == 4096 * (value - 128) * 127 * sign).all()


def _graph(checkpoint: Checkpoint) -> DecoderGraph:
    graph = build_decoder(checkpoint.config)
    transpose_weights(graph)
    quantize_matmuls(graph)
    fuse_quantized(graph)
    return graph


def _logits(checkpoint: Checkpoint, lengths: list[int], max_packed: int) -> npt.NDArray[np.float32]:
    """Of prompts of random tokens in one step, and then of two more tokens of each."""
    config = checkpoint.config
    count, tokens = len(lengths), sum(lengths)
    cache = allocate_kv_cache(
        config.num_hidden_layers, 4 * count, 16, config.num_key_value_heads, config.head_dim
    )
    session = DecoderSession(
        _graph(checkpoint), checkpoint, cache,
        max_tokens=tokens, max_sampled=count, max_len=64, num_threads=2, max_packed=max_packed,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    blocks = np.arange(4 * count).astype(np.int32).reshape(count, 4)
    found = []
    context = np.zeros(count, np.int32)
    for step in (np.array(lengths, np.int32), np.ones(count, np.int32), np.ones(count, np.int32)):
        start = np.concatenate([[0], np.cumsum(step)]).astype(np.int32)
        session.hidden[: start[-1]] = rng.standard_normal((start[-1], config.hidden_size), np.float32)
        context += step
        session.record.fill(StepLayout(start, context, blocks), count)
        session.run((start[1:] - 1).astype(np.int64))
        found.append(session.logits[:count].copy())
    session.close()
    return np.array(found)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_both_products_give_the_same_bits(architecture: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint(architecture, tmp_path))
    assert packed_bytes(_graph(checkpoint)) > 0
    for lengths in ([5], [3, 17, 1]):
        wide = _logits(checkpoint, lengths, 0)
        assert np.isfinite(wide).all()
        for max_packed in (3, 64):  # the prompts' step as well only in the second
            assert _logits(checkpoint, lengths, max_packed).tobytes() == wide.tobytes()


def test_a_graph_with_other_products_is_not_packed(tmp_path: Path) -> None:
    graph = build_decoder(open_checkpoint(write_tiny_checkpoint("llama", tmp_path)).config)
    transpose_weights(graph)
    assert packed_bytes(graph) == 0


@pytest.mark.skipif(not has_tiles(), reason="needs a processor with AMX")
@pytest.mark.parametrize("rows", [1, 9, 15, 16, 17, 33, 256, 257, 300])
@pytest.mark.parametrize(("columns", "outputs"), [(64, 16), (64, 80), (576, 96), (1600, 48)])
def test_sums_of_tiles_are_those_of_integers(rows: int, columns: int, outputs: int) -> None:
    x = _RNG.integers(0, 256, (rows, columns), np.uint8)
    weight = _RNG.integers(-127, 128, (outputs, columns), np.int8)
    exact = (x.astype(np.int64) - 128) @ weight.T.astype(np.int64)
    for parts in (1, 3, 8):
        np.testing.assert_array_equal(_multiply(x, weight, parts, least_tiled=1), exact)
