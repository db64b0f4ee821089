"""Segments on a GPU against float32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.gpu_found import skip_without_gpu

pytestmark = skip_without_gpu

from engine_runtime.cuda import CudaDevice, Stream  # noqa: E402
from engine_runtime.executors.tensorrt_segment import TrtSegment  # noqa: E402
from engine_runtime.executors.trt_builder import TrtBuilder  # noqa: E402
from engine_runtime.models.architectures import ARCHITECTURES  # noqa: E402
from engine_runtime.models.segment import DType, SegmentKind  # noqa: E402
from tests.engine_runtime.tiny_configs import tiny_config  # noqa: E402
from tests.gpu.segment_case import SegmentCase, llama_8b_config, make_case, relative_errors  # noqa: E402

KINDS: tuple[SegmentKind, ...] = ("first", "middle", "last")


@pytest.fixture(scope="module")
def stream() -> Iterator[Stream]:
    CudaDevice()
    stream = Stream()
    yield stream
    stream.close()


@pytest.fixture(scope="module")
def builder() -> TrtBuilder:
    return TrtBuilder()


def trt_segment(case: SegmentCase, builder: TrtBuilder) -> TrtSegment:
    num_tokens = case.segment.num_tokens
    assert num_tokens is not None
    return TrtSegment(builder.build(case.segment), num_tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensorrt_computes_every_segment(
    architecture: str, dtype: DType, stream: Stream, builder: TrtBuilder
) -> None:
    for kind in KINDS:
        for num_tokens in (1, 24, 128):
            case = make_case(tiny_config(architecture), kind, num_tokens, dtype)
            errors = relative_errors(case, case.run(trt_segment(case, builder), stream))
            assert all(error < 1e-2 for error in errors.values()), (kind, num_tokens, errors)


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256])
def test_tensorrt_computes_a_layer_of_8b(num_tokens: int, stream: Stream, builder: TrtBuilder) -> None:
    case = make_case(llama_8b_config(), "middle", num_tokens)
    errors = relative_errors(case, case.run(trt_segment(case, builder), stream))
    assert all(error < 1e-2 for error in errors.values()), errors


def test_one_engine_serves_layers_in_turn(stream: Stream, builder: TrtBuilder) -> None:
    cases = [make_case(tiny_config("llama"), "middle", 16, seed=seed) for seed in (1, 2, 3)]
    segment = trt_segment(cases[0], builder)
    for case in (*cases, *reversed(cases)):
        errors = relative_errors(case, case.run(segment, stream))
        assert all(error < 1e-2 for error in errors.values()), errors


def test_kernels_compiled_before_are_used_again(stream: Stream, builder: TrtBuilder, tmp_path: Path) -> None:
    case = make_case(tiny_config("llama"), "middle", 16)
    trt_engine = builder.build(case.segment)
    first = TrtSegment(trt_engine, 16)
    case.run(first, stream)
    kernels = first.compiled_kernels()
    if kernels is None:
        pytest.skip("this TensorRT compiles nothing when it loads an engine")
    second = TrtSegment(trt_engine, 16, kernels)
    assert second.had_compiled_kernels
    errors = relative_errors(case, case.run(second, stream))
    assert all(error < 1e-2 for error in errors.values()), errors
    damaged = TrtSegment(trt_engine, 16, kernels[: len(kernels) // 2])
    assert not damaged.had_compiled_kernels
    case.run(damaged, stream)
