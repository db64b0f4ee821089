"""Good files read as the safetensors package reads them; bad ones are refused, whatever their fault."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from engine_runtime.weights.errors import CheckpointError
from engine_runtime.weights.safetensors_file import MAX_HEADER_BYTES, MAX_TENSORS, SafetensorsFile


def write(path: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)
    return path


def entry(dtype: str, shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reads_what_was_saved(dtype: type, tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    tensors = {
        "odd": random.standard_normal(3).astype(dtype),
        "matrix": random.standard_normal((5, 7)).astype(dtype),
        "empty": np.empty((0, 4), dtype),
        "scalar": np.array(2.5, dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    assert file.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        values = file.read(name)
        assert (values.dtype, values.shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(values, tensor)


def test_tensors_are_views_that_outlive_the_file_and_cannot_be_written(tmp_path: Path) -> None:
    save_file({"x": np.arange(6, dtype=np.float32)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    values = file.read("x")
    assert values.base is not None
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1
    file.close()
    assert values.tolist() == [0, 1, 2, 3, 4, 5]


def test_unsupported_type_is_refused_when_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry("F8_E5M2", [4], 0, 4)}, b"1234")
    with pytest.raises(CheckpointError, match="tensor a has type F8_E5M2; supported are F32, F16, BF16"):
        SafetensorsFile(path).read("a")


NESTED = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
BAD_HEADERS: dict[str, tuple[Any, bytes, int | None]] = {
    "empty file": (b"", b"", None),
    "header length 2^63": (b"{}", b"", 1 << 63),
    "header length beyond the file": (b"{}", b"", 100),
    "header over the limit": (b"{}", b"", MAX_HEADER_BYTES + 1),
    "no JSON": (b"{", b"", None),
    "invalid UTF-8": (b'{"\xff": 1}', b"", None),
    "nested deeply": (NESTED, b"", None),
    "a list": (b"[]", b"", None),
    "a key twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"1",
        None,
    ),
    "an entry that is no object": ({"a": 1}, b"", None),
    "a missing shape": ({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"1", None),
    "three offsets": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"1", None),
    "an unknown type": ({"a": entry("F99", [1], 0, 1)}, b"1", None),
    "a negative dimension": ({"a": entry("U8", [-1, -1], 0, 1)}, b"1", None),
    "a fractional dimension": ({"a": entry("U8", [1.0], 0, 1)}, b"1", None),
    "a boolean dimension": ({"a": entry("U8", [True], 0, 1)}, b"1", None),
    "a product that overflows to the right size": (
        {"a": entry("U8", [1 << 32, 1 << 32, 1], 0, 0)},
        b"",
        None,
    ),
    "too many dimensions": ({"a": entry("U8", [1] * 9, 0, 1)}, b"1", None),
    "a shape larger than the data": ({"a": entry("F32", [2], 0, 4)}, b"1234", None),
    "offsets the wrong way round": ({"a": entry("U8", [0], 1, 0)}, b"1", None),
    "an offset beyond the file": ({"a": entry("U8", [9], 0, 9)}, b"1234", None),
    "an offset of 2^64": ({"a": entry("U8", [1], 1 << 64, (1 << 64) + 1)}, b"1", None),
    "overlapping tensors": ({"a": entry("U8", [3], 0, 3), "b": entry("U8", [2], 2, 4)}, b"1234", None),
    "twice the same bytes": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, b"1234", None),
    "a gap": ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [2], 2, 4)}, b"1234", None),
    "data behind the last tensor": ({"a": entry("U8", [1], 0, 1)}, b"1234", None),
    "too many tensors": ({f"{i}": entry("U8", [0], 0, 0) for i in range(MAX_TENSORS + 1)}, b"", None),
}


@pytest.mark.parametrize("case", sorted(BAD_HEADERS))
def test_bad_header_is_refused_quickly(case: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", *BAD_HEADERS[case])
    if case == "empty file":
        path.write_bytes(b"")
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        SafetensorsFile(path)
    assert time.process_time() - started < 1


def test_random_damage_never_escapes_the_checks(tmp_path: Path) -> None:
    random = np.random.RandomState(3)
    tensors = {f"layer.{i}": np.ones((i, 3), np.float32) for i in range(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    good = (tmp_path / "x.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(good[:8], "little")
    num_refused = 0
    for _ in range(200):
        bad = bytearray(good[: random.randint(len(good) + 1)] if random.rand() < 0.3 else good)
        for _ in range(random.randint(1, 4)):
            if bad:
                bad[random.randint(min(len(bad), header_end))] = random.randint(256)
        path = tmp_path / "bad.safetensors"
        path.write_bytes(bad)
        try:
            file = SafetensorsFile(path)
            for name in file.shapes:
                file.read(name)
        except CheckpointError:
            num_refused += 1
    assert num_refused > 40
