"""The quantized operators inside ONNX Runtime against numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import helper

from engine_runtime.executors.onnxruntime import row_kernels
from engine_runtime.executors.onnxruntime.node_states import OPERATORS, ROW_KERNELS
from engine_runtime.executors.onnxruntime.operators import DOMAIN, OperatorTable, compiled
from engine_runtime.executors.onnxruntime.ort_session import ELEMENT_TYPES, OrtSession

_RNG = np.random.default_rng(0)
Array = npt.NDArray[Any]


def _run(
    name: str,
    inputs: Sequence[Array],
    columns: int,
    *,
    rotation: int = 1,
    tasks: int = 3,
    epsilon: float = 0.0,
) -> list[Array]:
    """Runs one operator over the rows of its inputs, split into tasks on two threads."""
    operator = OPERATORS[name]
    rows = len(inputs[0])
    share = -(-rows // tasks)
    table = OperatorTable(np.array([rows, share, -(-rows // share) if rows else 0], np.int64))
    scratch = np.zeros((tasks, 4 * columns), np.uint8)
    widths = {"Dequantize": (columns,), "AddRmsNormQuantize": (columns, columns, 0)}.get(name, (columns, 0))
    node = table.add_node(
        rows=0,
        kernels=[(compiled(ROW_KERNELS[name]).address, 2)],
        num_inputs=len(inputs),
        output_columns=widths,
        columns=columns,
        constant=epsilon,
        rotation=rotation,
        scratch=(scratch.ctypes.data, scratch.strides[0]),
    )
    outputs: list[Array] = [
        np.zeros((rows, width) if width else rows, dtype)
        for width, dtype in zip(widths, operator.outputs, strict=True)
    ]
    names = [f"input.{i}" for i in range(len(inputs))], [f"output.{i}" for i in range(len(outputs))]
    graph = helper.make_graph(
        [helper.make_node(name, *names, domain=DOMAIN, node=node)],
        "test",
        [
            helper.make_tensor_value_info(n, ELEMENT_TYPES[a.dtype], [None] * a.ndim)
            for n, a in zip(names[0], inputs, strict=True)
        ],
        [
            helper.make_tensor_value_info(n, ELEMENT_TYPES[a.dtype], [None] * a.ndim)
            for n, a in zip(names[1], outputs, strict=True)
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = OrtSession(model, {}, [table.build(operator)], DOMAIN, num_threads=2)
    for n, array in zip(names[0], inputs, strict=True):
        session.bind_input(n, np.ascontiguousarray(array))
    for n, array in zip(names[1], outputs, strict=True):
        session.bind_output(n, array)
    session.run()
    session.close()
    return outputs


def hadamard(size: int) -> npt.NDArray[np.float64]:
    """The matrix of signs, by Sylvester's construction."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotate(rows: Array, rotation: int) -> npt.NDArray[np.float64]:
    blocks = rows.astype(np.float64).reshape(len(rows), -1, rotation)
    return (blocks @ hadamard(rotation)).reshape(rows.shape)


def _check_rows(q: Array, scale: Array, expected: npt.NDArray[np.float64]) -> None:
    """The largest of a row is 127 steps, and nothing is off by more than half a step, but for rounding."""
    largest = np.abs(expected).max(axis=1)
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-5)
    error = np.abs((q.astype(np.float64) - 128) * scale[:, None] - expected)
    assert (error <= 0.5001 * scale[:, None] + 1e-5 * largest[:, None]).all()
    assert (np.abs(q.astype(int) - 128).max(axis=1) == 127).all()


def _sums(rows: int, columns: int) -> tuple[Array, Array, Array, npt.NDArray[np.float64]]:
    """A quantized product and what it stands for."""
    sums = _RNG.integers(-(10**6), 10**6, (rows, columns)).astype(np.int32)
    scale = _RNG.uniform(0.5, 2.0, rows).astype(np.float32) * np.float32(1e-3)
    column_scale = _RNG.uniform(0.5, 2.0, columns).astype(np.float32) * np.float32(1e-3)
    return sums, scale, column_scale, sums.astype(np.float64) * scale[:, None] * column_scale


@pytest.mark.parametrize(
    ("columns", "rotation"), [(16, 1), (48, 16), (96, 32), (64, 64), (384, 128), (1536, 512)]
)
@pytest.mark.parametrize("rows", [1, 7])
def test_quantize_rows(rows: int, columns: int, rotation: int) -> None:
    x = (_RNG.standard_normal((rows, columns)) * 10.0 ** _RNG.integers(-3, 4, (rows, 1))).astype(np.float32)
    x[:, 5] *= 40
    q, scale = _run("QuantizeRows", [x], columns, rotation=rotation)
    _check_rows(q, scale, rotate(x, rotation))


def test_halves_round_to_even() -> None:
    x = np.zeros((1, 16), np.float32)
    x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    q, scale = _run("QuantizeRows", [x], 16)
    assert scale.tolist() == [1.0]
    assert (q[0, :6].astype(int) - 128).tolist() == [127, 0, 2, 2, 0, -2]


def test_row_of_zeros_stays_zero() -> None:
    q, scale = _run("QuantizeRows", [np.zeros((2, 32), np.float32)], 32, rotation=32)
    assert (q == 128).all()
    assert (scale == 0).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_the_scale_of_its_row_only(bad: float) -> None:
    x = np.ones((3, 64), np.float32)
    x[1, 7] = bad
    _, scale = _run("QuantizeRows", [x], 64)
    assert np.isfinite(scale).tolist() == [True, False, True]


@pytest.mark.parametrize("rows", [1, 6])
def test_dequantize(rows: int) -> None:
    sums, scale, column_scale, expected = _sums(rows, 48)
    (y,) = _run("Dequantize", [sums, scale, column_scale], 48)
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("rotation", [1, 32])
def test_swiglu_quantize(rotation: int) -> None:
    sums, scale, column_scale, gate_up = _sums(5, 192)
    gate, up = gate_up[:, :96] * 8, gate_up[:, 96:]
    column_scale[:96] *= 8
    q, scale_out = _run("SwigluQuantize", [sums, scale, column_scale], 96, rotation=rotation)
    _check_rows(q, scale_out, rotate(gate / (1 + np.exp(-gate)) * up, rotation))


def test_swiglu_of_extreme_gates() -> None:
    sums = np.zeros((1, 32), np.int32)
    sums[0, :16] = 1000 * np.arange(-8, 8)
    sums[0, 16:] = 1
    ones = np.ones(32, np.float32)
    q, scale = _run("SwigluQuantize", [sums, ones[:1], ones], 16)
    gates = 1000.0 * np.arange(-8, 8)
    np.testing.assert_allclose(
        (q[0].astype(float) - 128) * scale, np.maximum(gates, 0.0), atol=0.51 * scale[0]
    )


@pytest.mark.parametrize("rotation", [1, 64])
def test_add_rms_norm_quantize(rotation: int) -> None:
    sums, scale, column_scale, product = _sums(5, 64)
    residual = _RNG.standard_normal((5, 64)).astype(np.float32)
    weight = _RNG.uniform(0.5, 2.0, 64).astype(np.float32)
    inputs = [sums, scale, column_scale, residual, weight]
    total, q, scale_out = _run("AddRmsNormQuantize", inputs, 64, rotation=rotation, epsilon=1e-2)
    expected = product + residual
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)
    normed = expected / np.sqrt((expected**2).mean(axis=1, keepdims=True) + 1e-2) * weight
    _check_rows(q, scale_out, rotate(normed, rotation))


def test_a_row_does_not_depend_on_its_batch() -> None:
    sums, scale, column_scale, _ = _sums(9, 192)
    together = _run("SwigluQuantize", [sums, scale, column_scale], 96, rotation=32)
    for row in range(9):
        alone = _run(
            "SwigluQuantize", [sums[row : row + 1], scale[row : row + 1], column_scale], 96, rotation=32
        )
        assert all((a[0] == b[row]).all() for a, b in zip(alone, together, strict=True))


def test_no_rows_is_no_work() -> None:
    q, scale = _run("QuantizeRows", [np.zeros((0, 32), np.float32)], 32)
    assert (q.shape, scale.shape) == ((0, 32), (0,))


def test_every_row_kernel_is_an_operator() -> None:
    assert set(ROW_KERNELS) <= set(OPERATORS)
    assert all(callable(getattr(row_kernels, kernel.__name__)) for kernel in ROW_KERNELS.values())
