"""Segments as kernels, in Triton's interpreter; tests/gpu/test_segments.py runs more of them on a GPU."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed: pip install -e '.[gpu]'")

from engine_runtime.executors.tensorrt.gemm_form import parse_forms
from engine_runtime.executors.tensorrt.kernel_forms import Quantization, candidates, projections
from engine_runtime.executors.tensorrt.kernel_segment import KernelSegment, UnsupportedSegmentError
from engine_runtime.models.architectures import ARCHITECTURES
from engine_runtime.models.segment import SegmentKind
from tests.engine_runtime.kernels.interpreter_process import (
    check_interpreted,
    in_the_interpreter,
    starts_the_interpreter,
)
from tests.engine_runtime.tiny_configs import tiny_config
from tests.gpu.segment_case import SegmentCase, make_case, relative_errors

KINDS: tuple[SegmentKind, ...] = ("first", "middle", "last")


@starts_the_interpreter
def test_kernels_in_the_interpreter() -> None:
    check_interpreted(__file__)


class NamesOnly:
    """A library of kernels that nobody launches."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def get(self, name: str) -> Any:
        raise AssertionError(name)


def test_other_architectures_and_dimensions_are_left_to_tensorrt() -> None:
    library: Any = NamesOnly("skinny_plain_16x32x64x8x4", "skinny_silu_16x64x64x5x8")
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    KernelSegment(tiny_config("llama", **sizes), "middle", 16, library, 132)
    others: list[dict[str, object]] = [
        {"has_mlp_bias": True},
        {"has_o_bias": True},
        {"intermediate_size": 200},
    ]
    for changes in others:
        with pytest.raises(UnsupportedSegmentError):
            KernelSegment(tiny_config("llama", **(sizes | changes)), "middle", 16, library, 132)
    for num_tokens, quantization in ((17, "none"), (16, "fp8")):
        with pytest.raises(UnsupportedSegmentError, match="attention_output"):
            KernelSegment(
                tiny_config("llama", **sizes), "middle", num_tokens, library, 132, None, quantization
            )


def test_a_choice_that_is_gone_is_predicted_again() -> None:
    library: Any = NamesOnly("skinny_plain_16x32x64x8x4", "skinny_silu_16x64x64x5x8")
    config = tiny_config("llama", hidden_size=128, intermediate_size=256)
    segment = KernelSegment(config, "middle", 16, library, 132, {"qkv": "skinny_plain_16x999x64x8x4"})
    assert segment.forms["qkv"].name == "skinny_plain_16x32x64x8x4"


def test_addresses_are_needed_first() -> None:
    library: Any = NamesOnly("skinny_plain_16x32x64x8x4", "skinny_silu_16x64x64x5x8")
    config = tiny_config("llama", hidden_size=128, intermediate_size=256)
    with pytest.raises(ValueError, match="workspace"):
        KernelSegment(config, "middle", 16, library, 132).bind({})


@in_the_interpreter
class TestInterpreted:
    """Every architecture and every form that does not need tensor maps."""

    sizes = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 208, "final_logit_softcap": None}  # noqa: RUF012

    @staticmethod
    def library() -> Any:
        from engine_runtime.kernels.triton import segment_gemm_specs, segment_rows
        from tests.engine_runtime.kernels.interpreted_kernels import InterpretedLibrary

        return InterpretedLibrary([*segment_gemm_specs.SPECS, *segment_rows.SPECS], 89)

    @staticmethod
    def errors(case: SegmentCase, segment: KernelSegment) -> dict[str, float]:
        from tests.engine_runtime.kernels.interpreted_kernels import HostMemory

        memory = HostMemory()
        addresses = {name: memory.put(np.ascontiguousarray(array)) for name, array in case.inputs.items()}
        outputs = {}
        for name, array in case.expected.items():
            dtype: Any = np.float32 if name == "logits" else ml_dtypes.bfloat16
            outputs[name] = np.frombuffer(b"\xff" * array.size * np.dtype(dtype).itemsize, dtype)
            outputs[name] = outputs[name].reshape(array.shape)
            addresses[name] = memory.put(outputs[name])
        segment.use_workspace(memory.put(np.full(segment.workspace_bytes, 0xFF, np.uint8)))
        stream: Any = memory.stream
        segment.bind(addresses).enqueue(stream)
        results = {name: memory.get(addresses[name], array) for name, array in outputs.items()}
        return relative_errors(case, {name: array.astype(np.float32) for name, array in results.items()})

    @pytest.mark.parametrize(
        ("architecture", "quantization"),
        [*((name, "none") for name in ARCHITECTURES if name != "mistral"), ("qwen3", "fp8")],
    )
    def test_every_segment(self, architecture: str, quantization: Quantization) -> None:
        """Mistral's graphs are Llama's. The interpreter rounds to E4M3 towards zero: errors up to 9 %."""
        config = tiny_config(architecture, **self.sizes)
        for kind in KINDS:
            for num_tokens in (1, 5):
                case = make_case(config, kind, num_tokens, is_fp8=quantization == "fp8")
                segment = KernelSegment(config, kind, num_tokens, self.library(), 132, None, quantization)
                errors = self.errors(case, segment)
                limit = 1e-2 if quantization == "none" else 0.1
                assert all(error < limit for error in errors.values()), (kind, num_tokens, errors)

    def test_partial_sums(self) -> None:
        config = tiny_config("qwen2", **(self.sizes | {"intermediate_size": 256}))
        library = self.library()
        case = make_case(config, "middle", 20)
        for projection in projections(config, "middle"):
            for form in candidates(parse_forms(library.names), config, "middle", projection, 20, 132):
                if form.num_parts > 1:
                    segment = KernelSegment(config, "middle", 20, library, 132, {projection: form.name})
                    errors = self.errors(case, segment)
                    assert all(error < 1e-2 for error in errors.values()), (form.name, errors)
