"""Register tiles of every shape, against a chain of multiply-adds in exact order."""

from __future__ import annotations

import numpy as np
import pytest

from engine_runtime.kernels.cpu_compile import kernel
from engine_runtime.kernels.cpu_tiles import MAX_ROWS, VECTOR_COUNTS, scores_tile, values_tile
from engine_runtime.kernels.numpy_types import Float32Array, Int32Array

SHAPES = [(rows, vectors) for rows in range(1, MAX_ROWS + 1) for vectors in VECTOR_COUNTS]


@kernel
def _scores(
    rows: int,
    vectors: int,
    q: Float32Array,
    cache: Float32Array,
    block_size: int,
    table: Int32Array,
    key: int,
    out: Float32Array,
) -> None:
    scores_tile(
        rows, vectors, q, 1, 40, 33, cache, 7, 2000, block_size, table, 2, key, key + 16 * vectors,
        7 + 33 * block_size, 48, out, 3, 70,
    )  # fmt: skip


@kernel
def _values(
    rows: int,
    vectors: int,
    p: Float32Array,
    num_keys: int,
    cache: Float32Array,
    block_size: int,
    table: Int32Array,
    out: Float32Array,
) -> None:
    values_tile(
        rows, vectors, p, 1, 50, num_keys, cache, 7, 80, 4000, block_size, table, 2, out, 3, 70,
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "vectors"), SHAPES)
@pytest.mark.parametrize("block_size", [16, 48])
def test_scores(rows: int, vectors: int, block_size: int) -> None:
    rng = np.random.default_rng(rows * 8 + vectors)
    q = rng.standard_normal(1 + 6 * 40).astype(np.float32)
    cache = rng.standard_normal(12 * 2000).astype(np.float32)
    table = np.array([99, 99, 5, 2, 9, 0, 7, 3], np.int32)
    out = np.full(3 + 6 * 70, np.nan, np.float32)
    first = 16
    _scores(rows, vectors, q, cache, block_size, table, first, out)
    written = out[3:].reshape(6, 70)
    for row in range(rows):
        for i in range(16 * vectors):
            key = first + i
            column = table[2 + key // block_size] * 2000 + 7 + key % block_size + np.arange(33) * block_size
            exact = q[1 + row * 40 : 1 + row * 40 + 33].astype(np.float64) @ cache[column]
            assert written[row, i] == pytest.approx(exact, abs=1e-5)
    written[:rows, : 16 * vectors] = np.nan
    assert np.isnan(out).all()


@pytest.mark.parametrize(("rows", "vectors"), SHAPES)
@pytest.mark.parametrize(("block_size", "num_keys"), [(16, 1), (16, 16), (16, 41), (48, 47)])
def test_values(rows: int, vectors: int, block_size: int, num_keys: int) -> None:
    rng = np.random.default_rng(rows * 8 + vectors)
    p = np.full(1 + 6 * 50, np.nan, np.float32)
    p[1:].reshape(6, 50)[:, :num_keys] = rng.standard_normal((6, num_keys))
    cache = rng.standard_normal(12 * 4000).astype(np.float32)
    table = np.array([99, 99, 5, 2, 9], np.int32)
    out = rng.standard_normal(3 + 6 * 70).astype(np.float32)
    before = out.copy()
    _values(rows, vectors, p, num_keys, cache, block_size, table, out)
    keys = np.arange(num_keys)
    starts = table[2 + keys // block_size] * 4000 + 7 + keys % block_size * 80
    values = cache[starts[:, None] + np.arange(16 * vectors)].astype(np.float64)
    expected = before.copy()
    tile = expected[3:].reshape(6, 70)[:rows, : 16 * vectors]
    tile += p[1:].reshape(6, 50)[:rows, :num_keys].astype(np.float64) @ values
    np.testing.assert_allclose(out, expected, atol=1e-5)
    expected[3:].reshape(6, 70)[:rows, : 16 * vectors] = before[3:].reshape(6, 70)[:rows, : 16 * vectors]
    untouched = expected == before
    untouched[3:].reshape(6, 70)[:rows, : 16 * vectors] = False
    assert (out[untouched] == before[untouched]).all()


def test_an_element_does_not_depend_on_its_tile() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal(1 + 6 * 40).astype(np.float32)
    cache = rng.standard_normal(12 * 2000).astype(np.float32)
    table = np.array([99, 99, 5, 2, 9, 0, 7, 3], np.int32)
    results = {}
    for rows, vectors in SHAPES:
        out = np.zeros(3 + 6 * 70, np.float32)
        _scores(rows, vectors, q, cache, 16, table, 0, out)
        for row in range(rows):
            for i in range(16 * vectors):
                results.setdefault((row, i), set()).add(out[3 + 70 * row + i].tobytes())
    assert all(len(found) == 1 for found in results.values())
