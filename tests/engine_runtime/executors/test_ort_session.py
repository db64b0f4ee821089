from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from engine_runtime.executors.onnxruntime.ort_api import OnnxRuntimeError, ort_api
from engine_runtime.executors.onnxruntime.ort_session import OrtSession, external_initializer, packs_matrices

_WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def _session(op_type: str = "MatMul", profile_prefix: Path | None = None) -> OrtSession:
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x", "w"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [external_initializer("w", _WEIGHT.dtype, _WEIGHT.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    data = model.SerializeToString()
    return OrtSession(data, {"w": _WEIGHT}, [], "test", num_threads=1, profile_prefix=profile_prefix)


def test_runs_over_bound_buffers_of_changing_length() -> None:
    session = _session()
    for rows in (1, 5, 0, 2):
        x = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
        y = np.full((rows, 4), np.nan, np.float32)
        session.bind_input("x", x)
        session.bind_output("y", y)
        session.run()
        np.testing.assert_allclose(y, x @ _WEIGHT, rtol=1e-5)
    session.close()
    session.close()


def test_buffers_are_read_anew_at_each_run() -> None:
    session = _session()
    x, y = np.zeros((1, 3), np.float32), np.zeros((1, 4), np.float32)
    session.bind_input("x", x)
    session.bind_output("y", y)
    for value in (1.0, 2.0):
        x[:] = value
        session.run()
        np.testing.assert_array_equal(y[0], value * _WEIGHT.sum(axis=0))
    session.close()


def test_bad_graph_and_bad_shape_raise_with_the_message_of_the_runtime() -> None:
    with pytest.raises(OnnxRuntimeError, match="NoSuchOperator"):
        _session("NoSuchOperator")
    session = _session()
    session.bind_input("x", np.zeros((1, 7), np.float32))
    session.bind_output("y", np.zeros((1, 4), np.float32))
    with pytest.raises(OnnxRuntimeError):
        session.run()
    session.bind_input("x", np.ones((1, 3), np.float32))
    y = np.zeros((1, 4), np.float32)
    session.bind_output("y", y)
    session.run()
    np.testing.assert_array_equal(y[0], _WEIGHT.sum(axis=0))
    session.close()


def test_profile_is_written_on_close(tmp_path: Path) -> None:
    session = _session(profile_prefix=tmp_path / "trace")
    session.bind_input("x", np.ones((1, 3), np.float32))
    session.bind_output("y", np.zeros((1, 4), np.float32))
    session.run()
    session.close()
    (trace,) = tmp_path.glob("trace*.json")
    assert "MatMul" in trace.read_text()


def test_library_is_loaded_once_and_names_its_version() -> None:
    assert ort_api() is ort_api()
    assert ort_api().version.count(".") >= 2


def test_the_runtime_keeps_no_device_id_and_reports_to_nobody(tmp_path: Path) -> None:
    script = (
        "from tests.engine_runtime.executors import test_ort_session; test_ort_session._session().close()"
    )
    # It suppresses its telemetry by itself where it recognises continuous integration.
    is_ci = ("CI", "BUILD", "GITHUB", "TF_", "JENKINS", "TEAMCITY")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(is_ci)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*onnxruntime*"))


def test_matrices_are_packed_here() -> None:
    # Not a requirement, but without it the weights take twice the memory: somebody should notice.
    assert packs_matrices()
