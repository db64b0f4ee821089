"""The builder, without a GPU."""

from __future__ import annotations

import threading
import time

import pytest

from engine_runtime.executors.tensorrt.library import TensorRTError
from engine_runtime.executors.tensorrt.trt_builder import TrtBuilder
from engine_runtime.models.build import build_segment
from tests.engine_runtime.tiny_configs import tiny_config

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install -e '.[gpu]'")


def test_builds_a_segment_of_one_token_count() -> None:
    trt_engine = TrtBuilder([(8, 0)]).build(build_segment(tiny_config("qwen3"), "middle", "bfloat16", 16))
    assert len(trt_engine) > 10_000


def test_an_open_token_count_is_refused() -> None:
    with pytest.raises(ValueError, match="one token count"):
        TrtBuilder([(8, 0)]).build(build_segment(tiny_config("llama"), "middle", "bfloat16"))


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(TensorRTError, match="SM199"):
        TrtBuilder([(19, 9)])


def test_a_broken_graph_says_why() -> None:
    segment = build_segment(tiny_config("llama"), "middle", "bfloat16", 16)
    segment.model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(TensorRTError, match="NoSuchOperator"):
        TrtBuilder([(8, 0)]).build(segment)


def test_python_runs_while_a_thread_builds() -> None:
    """The daemon serves while further buckets are built."""
    builder = TrtBuilder([(8, 0)])
    segments = [build_segment(tiny_config("gemma3"), "middle", "bfloat16", 16 << i) for i in range(3)]
    thread = threading.Thread(target=lambda: [builder.build(segment) for segment in segments])
    ticks, start = 0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    milliseconds = (time.perf_counter() - start) * 1e3
    assert milliseconds > 50
    assert ticks > milliseconds / 20
