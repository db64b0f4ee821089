"""The plan of the weights and what is written where; the device is an array."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed: pip install -e '.[gpu]'")

from engine_runtime.executors.tensorrt.weight_loading import load_weights
from engine_runtime.executors.tensorrt.weight_pieces import ConvertedArray, Piece
from engine_runtime.executors.tensorrt.weight_plan import WeightPlan
from engine_runtime.models.architectures import ARCHITECTURES
from engine_runtime.models.build import build_segment
from engine_runtime.models.segment import SegmentKind
from engine_runtime.weights.checkpoint import Checkpoint
from engine_runtime.weights.expected_tensors import expected_tensors
from engine_runtime.weights.file_tensor import FileTensor
from engine_runtime.weights.fp8_tensor import Fp8Tensor
from tests.engine_runtime.tiny_configs import tiny_config

Array = npt.NDArray[Any]
_TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class ArraySource:
    """Random tensors in memory, float32 or bfloat16."""

    def __init__(self, architecture: str, dtype: Any, **changes: object) -> None:
        self.config = tiny_config(architecture, **changes)
        rng = np.random.default_rng(3)
        self.tensors = {
            name: rng.standard_normal(shape).astype(dtype)
            for name, shape in expected_tensors(self.config).items()
        }
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.num_bytes = 1
        self.fingerprint = "00"
        self.fp8: dict[str, Fp8Tensor] = {}

    @property
    def fp8_names(self) -> Collection[str]:
        return self.fp8.keys()

    def read_fp8(self, name: str) -> Fp8Tensor:
        return self.fp8[name]

    def read(self, name: str) -> Array:
        return self.tensors[name]

    def in_file(self, name: str) -> FileTensor | None:
        return None

    def close(self) -> None:
        pass

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.config, self, Path("memory"))


class ArrayTarget:
    """A device of host memory, which rounds bfloat16 to E4M3 by ml_dtypes."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = np.full(num_bytes, 0xAA, np.uint8)
        self.written = np.zeros(num_bytes, np.uint8)

    @contextmanager
    def open_lane(self, piece_bytes: int) -> Iterator[ArrayTarget]:
        yield self

    def take(self, piece: Piece) -> None:
        buffer = np.empty(piece.num_bytes, np.uint8)
        piece.read_into(buffer)
        if isinstance(piece.place, int):
            self._store(piece.place, buffer)
            return
        values = buffer.view(ml_dtypes.bfloat16).reshape(piece.place.num_rows, piece.place.columns)
        rounded = rounded_to_fp8(values)
        self._store(piece.place.offset, rounded.values)
        self._store(piece.place.scale_offset, rounded.scales)

    def _store(self, offset: int, values: Array) -> None:
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.memory[offset : offset + len(data)] = data
        self.written[offset : offset + len(data)] += 1


def rounded_to_fp8(values: Array) -> Fp8Tensor:
    """Each row times a factor that makes its largest number 448, as the kernel ``quantize_rows`` does it."""
    values = values.astype(np.float32)
    scales = np.abs(values).max(axis=1) / np.float32(448)
    return Fp8Tensor((values / scales[:, None]).astype(ml_dtypes.float8_e4m3fn), scales.astype(np.float32))


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_segments_find_their_weights(architecture: str, stored: Any) -> None:
    source = ArraySource(architecture, stored)
    plan = WeightPlan(source.config)
    target = ArrayTarget(plan.num_bytes)
    load_weights(plan, source.checkpoint(), target.open_lane)
    assert target.written.max() == 1
    table = target.memory[plan.embedding_offset :][: 2 * 176 * 64].view(ml_dtypes.bfloat16)
    expected = source.tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(table.reshape(176, 64), expected)
    kinds: tuple[SegmentKind, ...] = ("first", "middle", "last")
    for layer, kind in enumerate(kinds, start=-1):
        offsets = plan.offsets(layer)
        weights = build_segment(source.config, kind, "bfloat16").weights
        assert offsets.keys() == {weight.name for weight in weights}
        for weight in weights:
            names = weight.source_names(layer=layer, next_layer=layer + 1)
            dtype = np.dtype(_TYPES[weight.dtype])
            expected = np.concatenate([source.tensors[name] for name in names]).astype(dtype)
            assert offsets[weight.name] % 256 == 0
            found = target.memory[offsets[weight.name] :][: expected.nbytes].view(dtype)
            np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantized_projections_have_a_factor_for_each_row(architecture: str) -> None:
    source = ArraySource(architecture, np.float32)
    plan = WeightPlan(source.config, quantization="fp8")
    target = ArrayTarget(plan.num_bytes)
    load_weights(plan, source.checkpoint(), target.open_lane)
    assert target.written.max() == 1
    offsets = plan.offsets(0)
    for weight in build_segment(source.config, "middle", "bfloat16").weights:
        names = weight.source_names(layer=0, next_layer=1)
        expected = np.concatenate([source.tensors[name] for name in names])
        is_quantized = f"{weight.name}_scale" in offsets
        assert is_quantized == (len(weight.shape) == 2)
        if not is_quantized:
            continue
        start, size = offsets[weight.name], expected.size
        values = target.memory[start : start + size].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        start = offsets[f"{weight.name}_scale"]
        scales = target.memory[start : start + 4 * len(expected)].view(np.float32)
        found = values.reshape(expected.shape) * scales[:, None]
        assert np.linalg.norm(found - expected) < 0.04 * np.linalg.norm(expected)
    assert "lm_head.weight_scale" not in plan.offsets(1)
    assert plan.num_bytes < WeightPlan(source.config).num_bytes


def test_what_the_checkpoint_holds_in_fp8_arrives_as_it_is() -> None:
    """Rounding it again, with the row's largest number as 448, would change most numbers."""
    source = ArraySource("llama", np.float32)
    rng = np.random.default_rng(5)
    name = "model.layers.1.self_attn.k_proj.weight"
    shape = source.shapes[name]
    values = rng.integers(0, 0x70, shape, np.uint8).view(ml_dtypes.float8_e4m3fn)
    source.fp8[name] = Fp8Tensor(values, rng.random((shape[0],)).astype(np.float32))
    plan = WeightPlan(source.config, quantization="fp8")
    target = ArrayTarget(plan.num_bytes)
    load_weights(plan, source.checkpoint(), target.open_lane)
    assert target.written.max() == 1
    offsets = plan.offsets(0)
    first = source.config.q_size
    start = offsets["next_layer.self_attn.qkv_proj.weight"] + first * shape[1]
    found = target.memory[start : start + values.size].reshape(shape)
    np.testing.assert_array_equal(found, values.view(np.uint8))
    start = offsets["next_layer.self_attn.qkv_proj.weight_scale"] + 4 * first
    found = target.memory[start : start + 4 * shape[0]].view(np.float32)
    np.testing.assert_array_equal(found, source.fp8[name].scales)
    plain = WeightPlan(source.config)
    target = ArrayTarget(plain.num_bytes)
    load_weights(plain, source.checkpoint(), target.open_lane)  # 16 bits were asked for: what ``read`` gives
    assert target.written.max() == 1


def test_tied_embeddings_are_stored_once() -> None:
    separate, tied = (
        WeightPlan(tiny_config("llama", tie_word_embeddings=is_tied)) for is_tied in (False, True)
    )
    names = [tensor.name for tensor in tied.tensors]
    assert len(names) == len(set(names)) == len(separate.tensors) - 1
    assert tied.num_bytes < separate.num_bytes
    assert tied.offsets(1)["lm_head.weight"] == tied.embedding_offset


def test_a_failed_read_is_reported() -> None:
    source = ArraySource("llama", np.float32)
    checkpoint = source.checkpoint()
    del source.tensors["model.layers.1.mlp.up_proj.weight"]
    plan = WeightPlan(source.config)
    with pytest.raises(KeyError):
        load_weights(plan, checkpoint, ArrayTarget(plan.num_bytes).open_lane)


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_conversion_in_pieces_rounds_to_nearest(source: Any) -> None:
    values = np.random.default_rng(0).standard_normal((7, 301)).astype(source)
    array = ConvertedArray(values, np.dtype(ml_dtypes.bfloat16))
    result = np.empty(2 * values.size, np.uint8)
    for start in range(0, len(result), 514):
        array.read_into(start, result[start : start + 514])
    expected = values.astype(ml_dtypes.bfloat16).reshape(-1)
    np.testing.assert_array_equal(result.view(ml_dtypes.bfloat16), expected)
