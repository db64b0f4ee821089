"""Segments on a GPU against float32 on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.gpu_found import skip_without_gpu

pytestmark = skip_without_gpu

from engine_runtime.cuda import CudaDevice, DeviceBuffer, Stream  # noqa: E402
from engine_runtime.executors.tensorrt.engine_cache import EngineCache  # noqa: E402
from engine_runtime.executors.tensorrt.gemm_form import parse_forms  # noqa: E402
from engine_runtime.executors.tensorrt.kernel_forms import (  # noqa: E402
    Projection,
    Quantization,
    candidates,
    projections,
)
from engine_runtime.executors.tensorrt.kernel_segment import KernelSegment  # noqa: E402
from engine_runtime.executors.tensorrt.segment import TrtSegment  # noqa: E402
from engine_runtime.executors.tensorrt.tactics import SegmentFactory  # noqa: E402
from engine_runtime.executors.tensorrt.trt_builder import TrtBuilder  # noqa: E402
from engine_runtime.executors.tensorrt.weight_loading import load_weights  # noqa: E402
from engine_runtime.executors.tensorrt.weight_plan import WeightPlan  # noqa: E402
from engine_runtime.executors.tensorrt.weights import DeviceWeights  # noqa: E402
from engine_runtime.kernels.kernel_library import KernelLibrary, KernelsMissingError  # noqa: E402
from engine_runtime.model_config import ModelConfig  # noqa: E402
from engine_runtime.models.architectures import ARCHITECTURES  # noqa: E402
from engine_runtime.models.segment import DType, SegmentKind  # noqa: E402
from engine_runtime.weights.errors import CheckpointError  # noqa: E402
from tests.engine_runtime.executors.sharded_checkpoint import write_sharded_checkpoint  # noqa: E402
from tests.engine_runtime.executors.test_trt_weights import ArraySource, ArrayTarget  # noqa: E402
from tests.engine_runtime.tiny_configs import tiny_config  # noqa: E402
from tests.gpu.segment_case import (  # noqa: E402
    SegmentCase,
    llama_8b_config,
    make_case,
    relative_errors,
)

KINDS: tuple[SegmentKind, ...] = ("first", "middle", "last")


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


@pytest.fixture(scope="module")
def library(device: CudaDevice) -> KernelLibrary:
    try:
        return KernelLibrary(device)
    except KernelsMissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def stream(device: CudaDevice) -> Iterator[Stream]:
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


def kernel_segment(
    config: ModelConfig,
    kind: SegmentKind,
    num_tokens: int,
    device: CudaDevice,
    library: KernelLibrary,
    choice: Mapping[Projection, str] | None = None,
    quantization: Quantization = "none",
) -> KernelSegment:
    multiprocessors = device.properties.num_multiprocessors
    return KernelSegment(config, kind, num_tokens, library, multiprocessors, choice, quantization)


def small_config(architecture: str, **changes: object) -> ModelConfig:
    """Dimensions that kernels take, not all of them multiples of their blocks."""
    sizes = {"hidden_size": 192, "intermediate_size": 320, "vocab_size": 400, "final_logit_softcap": None}
    return tiny_config(architecture, **(sizes | changes))


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 24, 64, 65, 128, 300, 1030])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compute_every_segment(
    architecture: str, num_tokens: int, stream: Stream, device: CudaDevice, library: KernelLibrary
) -> None:
    config = small_config(architecture)
    for kind in KINDS:
        case = make_case(config, kind, num_tokens)
        segment = kernel_segment(config, kind, num_tokens, device, library)
        errors = relative_errors(case, case.run(segment, stream))
        assert all(error < 1e-2 for error in errors.values()), (kind, errors)


@pytest.mark.parametrize("num_tokens", [1, 4, 32, 64, 128, 256, 512, 1024])
def test_kernels_compute_a_layer_of_8b(
    num_tokens: int, stream: Stream, device: CudaDevice, library: KernelLibrary
) -> None:
    config = llama_8b_config()
    case = make_case(config, "middle", num_tokens)
    segment = kernel_segment(config, "middle", num_tokens, device, library)
    errors = relative_errors(case, case.run(segment, stream))
    assert all(error < 1e-2 for error in errors.values()), errors


@pytest.mark.parametrize("num_tokens", [1, 2, 24, 64, 65, 300, 1030])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp8_kernels_compute_every_segment(
    architecture: str, num_tokens: int, stream: Stream, device: CudaDevice, library: KernelLibrary
) -> None:
    """Rounding activations to 3 bits of fraction, three times on the way, costs up to 6 %."""
    config = small_config(architecture)
    for kind in KINDS:
        case = make_case(config, kind, num_tokens, is_fp8=True)
        segment = kernel_segment(config, kind, num_tokens, device, library, quantization="fp8")
        errors = relative_errors(case, case.run(segment, stream))
        limit = 1e-2 if num_tokens == 1 and architecture != "gemma3" and kind != "first" else 6e-2
        assert all(error < limit for error in errors.values()), (kind, errors)


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 1024])
def test_fp8_kernels_compute_a_layer_of_8b(
    num_tokens: int, stream: Stream, device: CudaDevice, library: KernelLibrary
) -> None:
    case = make_case(llama_8b_config(), "middle", num_tokens, is_fp8=True)
    segment = kernel_segment(llama_8b_config(), "middle", num_tokens, device, library, quantization="fp8")
    errors = relative_errors(case, case.run(segment, stream))
    print(num_tokens, errors)
    assert all(error < 6e-2 for error in errors.values()), errors


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_weights_arrive_from_a_checkpoint(
    quantization: Quantization, device: CudaDevice, library: KernelLibrary
) -> None:
    source = ArraySource("qwen2", np.float32, hidden_size=192, intermediate_size=320)
    plan = WeightPlan(source.config, quantization=quantization)
    weights = DeviceWeights(plan)
    weights.load(source.checkpoint(), device, library=library)
    expected = ArrayTarget(plan.num_bytes)
    load_weights(plan, source.checkpoint(), expected.open_lane)
    found = np.empty(plan.num_bytes, np.uint8)
    weights.read(found)
    written = expected.written.astype(bool)
    same = (found == expected.memory)[written].mean()
    assert same >= (1 if quantization == "none" else 0.98), same  # a division may round the other way
    weights.free()


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("types", [("bfloat16",), ("bfloat16", "float32")])
def test_weights_arrive_from_files_in_several_threads(
    types: tuple[str, ...],
    quantization: Quantization,
    device: CudaDevice,
    library: KernelLibrary,
    tmp_path: Path,
) -> None:
    """The table takes several pieces. A file that is cut off is an error that leaves the device usable."""
    sizes = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 32, "vocab_size": 60_001}
    stored = write_sharded_checkpoint(tmp_path / "model", "llama", types=types, **sizes)
    checkpoint = stored.open()
    plan = WeightPlan(checkpoint.config, quantization=quantization)
    weights = DeviceWeights(plan)
    whole = stored.shards[0].read_bytes()
    if types == ("bfloat16",):  # others are converted from a mapping
        os.truncate(stored.shards[0], len(whole) // 2)
        with pytest.raises(CheckpointError, match="has become shorter"):
            weights.load(checkpoint, device, library=library)
        stored.shards[0].write_bytes(whole)
    weights.load(checkpoint, device, library=library)
    found = np.empty(plan.num_bytes, np.uint8)
    weights.read(found)
    quantized = {tensor.offset for tensor in plan.tensors if tensor.scale_offset is not None}
    quantized |= {tensor.scale_offset for tensor in plan.tensors if tensor.scale_offset is not None}
    same = {
        offset: found[offset : offset + len(data)] == data for offset, data in stored.expected(plan).items()
    }
    assert all(is_same.all() for offset, is_same in same.items() if offset not in quantized)
    if quantized:
        rounded = np.concatenate([same[offset] for offset in quantized])
        assert rounded.mean() >= 0.97, rounded.mean()  # a division may round the other way
    weights.free()
    checkpoint.close()


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("num_tokens", [1, 16, 48, 64, 72, 128, 145, 160, 192, 256])
def test_every_form_computes_the_same(
    num_tokens: int, quantization: Quantization, stream: Stream, device: CudaDevice, library: KernelLibrary
) -> None:
    known = parse_forms(library.names)
    num_programs = device.properties.num_multiprocessors
    limit = 1e-2 if quantization == "none" else 6e-2
    for architecture in ("llama", "gemma3"):
        config = small_config(architecture, hidden_size=512, intermediate_size=1024)
        for kind in KINDS[1:]:
            case = make_case(config, kind, num_tokens, is_fp8=quantization == "fp8")
            for projection in projections(config, kind):
                if architecture == "gemma3" and projection != "gate_up":
                    continue  # the others have the same forms
                found = candidates(known, config, kind, projection, num_tokens, num_programs, quantization)
                for form in found:
                    choice: Mapping[Projection, str] = {projection: form.name}
                    segment = kernel_segment(config, kind, num_tokens, device, library, choice, quantization)
                    assert segment.forms[projection] == form
                    errors = relative_errors(case, case.run(segment, stream))
                    assert all(error < limit for error in errors.values()), (form.name, errors)


def test_the_fastest_tactic_is_kept(
    stream: Stream, device: CudaDevice, library: KernelLibrary, tmp_path: Path
) -> None:
    config = small_config("llama")
    case = make_case(config, "middle", 16)
    buffers = {name: DeviceBuffer.of(array) for name, array in case.inputs.items()}
    buffers |= {name: DeviceBuffer(array.nbytes) for name, array in case.expected.items()}
    addresses = {name: buffer.address for name, buffer in buffers.items()}
    workspace = DeviceBuffer(64 << 20)
    factory = SegmentFactory(config, device, EngineCache(tmp_path), library)
    assert factory.known_tactic("middle", 16) is None
    found = factory.tune("middle", 16, [addresses], (workspace.address, workspace.num_bytes), stream)
    assert found.microseconds.keys() == {"kernels", "tensorrt"}
    assert min(found.microseconds, key=lambda name: found.microseconds[name]) == found.formulation
    again = SegmentFactory(config, device, EngineCache(tmp_path), library)
    assert again.known_tactic("middle", 16) == found
    errors = relative_errors(case, case.run(again.make("middle", 16), stream))
    assert all(error < 1e-2 for error in errors.values()), errors
    for buffer in (*buffers.values(), workspace):
        buffer.free()
