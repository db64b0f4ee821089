"""Which formulation a segment gets; the GPU is a name. tests/gpu/test_segments.py times real ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed: pip install -e '.[gpu]'")
pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[dev]'")
pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install -e '.[gpu]'")

from engine_runtime.executors.tensorrt import tactics as tensorrt_tactics
from engine_runtime.executors.tensorrt.engine_cache import EngineCache
from engine_runtime.executors.tensorrt.kernel_forms import Quantization, projections
from engine_runtime.executors.tensorrt.kernel_segment import KernelSegment, UnsupportedSegmentError
from engine_runtime.executors.tensorrt.tactics import SegmentFactory, Tactic
from engine_runtime.executors.tensorrt.trt_builder import TrtBuilder
from engine_runtime.kernels.triton import segment_gemm_specs, segment_hopper_specs
from engine_runtime.model_config import ModelConfig
from engine_runtime.models.segment import SegmentKind
from tests.engine_runtime.tiny_configs import tiny_config

KINDS: tuple[SegmentKind, ...] = ("first", "middle", "last")
_SPECS = [*segment_gemm_specs.SPECS, *segment_hopper_specs.SPECS]
REAL_NAMES = tuple(spec.name for spec in _SPECS if 90 in spec.architectures)
NAMES = (
    "skinny_plain_16x32x64x8x4",
    "skinny_plain_16x64x64x8x4",
    "skinny_silu_16x64x64x5x8",
    "skinny_logits_16x32x64x8x4",
)


class NamesOnly:
    """A library of kernels that nobody launches."""

    names: tuple[str, ...] = NAMES

    def get(self, name: str) -> Any:
        raise AssertionError(name)


def config(**changes: object) -> ModelConfig:
    return tiny_config("llama", **({"hidden_size": 128, "intermediate_size": 256} | changes))


def factory(folder: Path, model: ModelConfig, **arguments: Any) -> SegmentFactory:
    properties = SimpleNamespace(compute_capability=(9, 0), name="NVIDIA H200", num_multiprocessors=132)
    device: Any = SimpleNamespace(properties=properties)
    library: Any = NamesOnly()
    return SegmentFactory(model, device, EngineCache(folder), library, **arguments)


class LoadedEngine:
    """An engine that nobody runs."""

    had_compiled_kernels = True
    workspace_bytes = 12345

    def __init__(self, trt_engine: bytes, num_tokens: int, compiled: bytes | None) -> None:
        assert trt_engine
        self.num_tokens = num_tokens


@pytest.fixture(autouse=True)
def tensorrt_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_tactics, "TrtBuilder", lambda: TrtBuilder([(8, 0)]))
    monkeypatch.setattr(tensorrt_tactics, "TrtSegment", LoadedEngine)


def store(made: SegmentFactory, tactic: Tactic, num_tokens: int) -> None:
    entry = {
        "formulation": tactic.formulation, "kernels": tactic.kernels, "microseconds": tactic.microseconds,
    }  # fmt: skip
    made._cache.store(made._tactic_key("middle", num_tokens), json.dumps(entry).encode())


def test_kernels_are_used_where_they_can_be(tmp_path: Path) -> None:
    segment = factory(tmp_path, config()).make("middle", 16)
    assert isinstance(segment, KernelSegment)
    assert segment.forms["qkv"].name == NAMES[0]


def test_what_was_found_is_used_for_its_own_shape_only(tmp_path: Path) -> None:
    made = factory(tmp_path, config())
    assert made.known_tactic("middle", 16) is None
    found = Tactic("kernels", {"qkv": NAMES[1]}, {"kernels": 5.0, "tensorrt": 9.0})
    store(made, found, 16)
    again = factory(tmp_path, config(num_hidden_layers=2, vocab_size=999))
    assert again.known_tactic("middle", 16) == found
    segment = again.make("middle", 16)
    assert isinstance(segment, KernelSegment)
    assert segment.forms["qkv"].name == NAMES[1]
    assert again.known_tactic("middle", 8) is None
    assert factory(tmp_path, config(hidden_size=192)).known_tactic("middle", 16) is None
    assert factory(tmp_path, config(), quantization="fp8").known_tactic("middle", 16) is None
    assert factory(tmp_path, config(), only="kernels").known_tactic("middle", 16) is None


@pytest.mark.parametrize(
    ("model", "arguments", "num_tokens"),
    [
        (config(has_mlp_bias=True), {}, 16),
        (config(), {"dtype": "float16"}, 16),
        (config(), {"only": "tensorrt"}, 16),
    ],
)
def test_the_engine_is_prepared_where_tensorrt_is_needed(
    tmp_path: Path, model: ModelConfig, arguments: dict[str, Any], num_tokens: int
) -> None:
    made = factory(tmp_path, model, **arguments)
    assert not made.is_ready("middle", num_tokens)
    made.prepare("middle", num_tokens)
    assert [path.suffix for path in tmp_path.iterdir()] == [".engine"]
    assert made.is_ready("middle", num_tokens)
    segment = made.make("middle", num_tokens)
    assert isinstance(segment, LoadedEngine)
    assert made.make("middle", num_tokens) is segment  # a second execution context would be of no use


def test_an_odd_vocabulary_needs_tensorrt_for_the_last_segment(tmp_path: Path) -> None:
    made = factory(tmp_path, config(vocab_size=401))
    made.prepare("middle", 16)
    assert list(tmp_path.iterdir()) == []
    made.prepare("last", 16)
    assert [path.suffix for path in tmp_path.iterdir()] == [".engine"]


def test_nothing_is_prepared_for_kernels(tmp_path: Path) -> None:
    made = factory(tmp_path, config())
    assert made.is_ready("middle", 16)
    made.prepare("middle", 16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 200, 1024, 3000])
def test_the_workspace_holds_every_choice(
    quantization: Quantization, num_tokens: int, tmp_path: Path
) -> None:
    model = config(hidden_size=512, intermediate_size=1024)
    made = factory(tmp_path, model, quantization=quantization)
    made._library = named = NamesOnly()  # type: ignore[assignment]
    named.names = REAL_NAMES
    for kind in KINDS:
        most = made.workspace_bytes(kind, [num_tokens])
        for projection in projections(model, kind):
            for form in made._candidates(kind, projection, num_tokens):
                choice = {projection: form.name}
                assert made._kernel_segment(kind, num_tokens, choice).workspace_bytes <= most
        assert made.workspace_bytes(kind, [1, num_tokens]) >= most


def test_of_engines_only_the_largest_is_asked_for_its_workspace(tmp_path: Path) -> None:
    made = factory(tmp_path, config(has_mlp_bias=True))
    assert made.workspace_bytes("middle", [8, 16]) == 12345
    assert (made.is_ready("middle", 8), made.is_ready("middle", 16)) == (False, True)


def test_a_tactic_is_found_without_making_its_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = factory(tmp_path, config())
    store(made, Tactic("kernels", {}, {"kernels": 5.0}), 16)

    def fail(*arguments: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(tensorrt_tactics, "build_segment", fail)
    assert made.known_tactic("middle", 16) is not None
    assert made.known_tactic("middle", 32) is None


def test_tensorrt_found_fastest_is_prepared(tmp_path: Path) -> None:
    made = factory(tmp_path, config())
    store(made, Tactic("tensorrt", {}, {"kernels": 9.0, "tensorrt": 5.0}), 16)
    made.prepare("middle", 16)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".engine", ".tactics"]


def test_fp8_is_not_replaced_by_something_else(tmp_path: Path) -> None:
    for model in (config(), config(has_mlp_bias=True)):
        with pytest.raises(UnsupportedSegmentError):
            factory(tmp_path, model, quantization="fp8").make("middle", 16)


@pytest.mark.parametrize(
    ("tuned", "times", "formulation", "qkv"),
    [
        (NAMES[1], {"tuned": 4.0, "predicted": 5.0}, "kernels", NAMES[1]),
        (NAMES[1], {"tuned": 5.0, "predicted": 4.0}, "kernels", NAMES[0]),
        (NAMES[1], {"tuned": 5.0, "predicted": 4.0, "tensorrt": 3.0}, "tensorrt", NAMES[0]),
        (NAMES[1], {"tuned": 3.0, "predicted": 4.0, "tensorrt": 5.0}, "kernels", NAMES[1]),
        (NAMES[0], {"tuned": 4.0}, "kernels", NAMES[0]),  # as predicted
    ],
)
def test_the_winners_are_kept_unless_the_predicted_are_faster_as_a_whole(
    tuned: str,
    times: dict[str, float],
    formulation: str,
    qkv: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = factory(tmp_path, config())
    timed: dict[str, Any] = {}

    def time_in_turns(segments: dict[str, Any], *arguments: object) -> dict[str, float]:
        timed.update(segments)
        return times

    monkeypatch.setattr(made, "_tune_kernels", lambda *arguments: {"qkv": tuned})
    monkeypatch.setattr(tensorrt_tactics, "_time_in_turns", time_in_turns)
    nothing: Any = None
    found = made.tune("middle", 16, (), (0, 0), nothing, with_tensorrt="tensorrt" in times)
    assert timed.keys() == times.keys()
    assert timed["tuned"].forms["qkv"].name == tuned
    assert (found.formulation, found.kernels["qkv"]) == (formulation, qkv)
    own = min(times[name] for name in times if name != "tensorrt")
    assert found.microseconds["kernels"] == own
    assert found.microseconds.get("tensorrt") == times.get("tensorrt")
    assert made.known_tactic("middle", 16) == found


def test_the_forms_predicted_to_be_best_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = config(hidden_size=512, intermediate_size=1024)
    made = factory(tmp_path, model)
    made._library = named = NamesOnly()  # type: ignore[assignment]
    named.names = REAL_NAMES
    timed: list[list[str]] = []

    def measure(ways: dict[str, Any], *arguments: object) -> dict[str, float]:
        timed.append(list(ways))
        return {name: float(-place) for place, name in enumerate(ways)}  # the last one is the fastest

    monkeypatch.setattr(tensorrt_tactics, "_measure_in_turns", measure)
    monkeypatch.setattr(KernelSegment, "parts", lambda segment, layer: dict.fromkeys(segment.forms, ()))
    nothing: Any = None
    chosen = made._tune_kernels("middle", 256, [{}], (0, 1 << 40), nothing)
    for projection, names in zip(projections(model, "middle"), timed, strict=True):
        found = [form.name for form in made._candidates("middle", projection, 256)]
        assert len(found) > len(names) == 7
        assert names == found[:7]
        assert chosen[projection] == names[-1]


def test_other_kernels_are_timed_again(tmp_path: Path) -> None:
    made = factory(tmp_path, config())
    store(made, Tactic("kernels", {}, {"kernels": 5.0}), 16)
    other: Any = NamesOnly()
    other.names = (*NAMES, "skinny_plain_16x128x64x8x4")
    again = SegmentFactory(config(), made._device, EngineCache(tmp_path), other)
    assert again.known_tactic("middle", 16) is None
