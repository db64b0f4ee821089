"""The vector operations, lane by lane, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from engine_runtime.kernels import cpu_simd as simd
from engine_runtime.kernels.cpu_compile import kernel
from engine_runtime.kernels.numpy_types import Float32Array


@kernel
def _exp2(x: Float32Array, y: Float32Array) -> None:
    for i in range(0, len(x), simd.LANES):
        simd.store(y, i, simd.exp2(simd.load(x, i)))


@kernel
def _keep_between(x: Float32Array, y: Float32Array, first: int, stop: int) -> None:
    simd.store(y, 0, simd.keep_between(simd.load(x, 0), first, stop, np.float32(-1.0)))


@kernel
def _transpose(x: Float32Array, y: Float32Array, source_stride: int, target_stride: int) -> None:
    simd.store_transposed(x, 1, source_stride, y, 2, target_stride)


@kernel
def _reduce(x: Float32Array, threshold: float, y: Float32Array) -> None:
    v = simd.load(x, 0)
    y[0] = simd.sum_lanes(v)
    y[1] = simd.max_lanes(v)
    y[2] = simd.count_at_least(v, threshold)
    y[3] = simd.count_not_below(v, threshold)
    y[4] = simd.sum_lanes(simd.keep_at_least(v, threshold))
    y[5] = simd.max_lanes(simd.at_most(v, threshold))


def exp2(x: Float32Array) -> Float32Array:
    y = np.empty_like(x)
    _exp2(x, y)
    return y


def test_exp2_is_accurate() -> None:
    x = np.linspace(-126, 126, 1 << 20, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(exp2(x) / exact - 1).max() < 1.2e-7


def test_exp2_of_integers_is_exact() -> None:
    x = np.arange(-126, 127, dtype=np.float32)
    x = np.concatenate([x, np.zeros(-len(x) % 16, np.float32)])
    assert (exp2(x) == np.exp2(x.astype(np.float64))).all()


def test_exp2_at_the_ends() -> None:
    x = np.array([-np.inf, -1e30, -126.5, -126.0, -0.0, 0.0, np.nan, 1.0] * 2, np.float32)
    x.view(np.uint32)[14] = 0xFFFFFFFF  # a NaN with all bits set
    y = exp2(x)
    assert (y[:3] == 0).all()
    assert y[3] == np.float32(2.0**-126)
    assert (y[4:6] == 1).all()
    assert np.isnan(y[[6, 14]]).all()


@pytest.mark.parametrize(("first", "stop"), [(0, 16), (3, 5), (-4, 2), (15, 99), (7, 7), (-9, -1), (16, 20)])
def test_keep_between(first: int, stop: int) -> None:
    x = np.arange(16, dtype=np.float32)
    y = np.empty_like(x)
    _keep_between(x, y, first, stop)
    lanes = np.arange(16)
    assert (y == np.where((lanes >= first) & (lanes < stop), x, -1)).all()


def test_transpose() -> None:
    x = np.random.default_rng(0).standard_normal(16 * 20 + 1).astype(np.float32)
    y = np.full(16 * 18 + 2, np.nan, np.float32)
    _transpose(x, y, 20, 18)
    assert (y[2:].reshape(16, 18)[:, :16] == x[1:].reshape(16, 20)[:, :16].T).all()
    assert np.isnan(y[2:].reshape(16, 18)[:, 16:]).all()


def test_reductions() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        x = np.round(rng.standard_normal(16) * 3).astype(np.float32)
        y = np.empty(6, np.float32)
        _reduce(x, np.float32(1.0), y)
        above = x >= 1
        expected = [x.sum(), x.max(), above.sum(), above.sum(), x[above].sum(), min(x.max(), 1)]
        assert y.tolist() == expected
    x[3] = np.nan
    _reduce(x, np.float32(1.0), y)
    assert y[3] == y[2] + 1
