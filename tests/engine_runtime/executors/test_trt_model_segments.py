"""Which form each segment's weights get, and what that asks of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install -e '.[gpu]'")

from engine_runtime.executors.tensorrt import model_segments
from engine_runtime.executors.tensorrt.kept_segments import kept_segments
from engine_runtime.executors.tensorrt.kernel_segment import UnsupportedSegmentError
from engine_runtime.executors.tensorrt.model_segments import ModelSegments, choose_segments
from engine_runtime.executors.tensorrt.weight_plan import WeightPlan
from engine_runtime.model_config import ModelConfig
from engine_runtime.runtime_config import RuntimeConfig, UnsupportedDeviceError
from engine_runtime.weights.checkpoint import Checkpoint, open_checkpoint
from engine_runtime.weights.expected_tensors import expected_tensors
from tests.engine_runtime.tiny_configs import tiny_config
from tests.engine_runtime.weights.test_fp8_checkpoint import write_fp8_checkpoint


class FakeFactory:
    """Makes what a set of (quantization, kind) says, else refuses."""

    supported: ClassVar[set[tuple[str, str]]] = set()
    asked: ClassVar[dict[tuple[str, str], Sequence[int]]] = {}

    def __init__(
        self, model: Any, device: Any, cache: Any, library: Any, *, quantization: str = "none"
    ) -> None:
        self.quantization = quantization

    def workspace_bytes(self, kind: str, buckets: Sequence[int]) -> int:
        if (self.quantization, kind) not in self.supported:
            raise UnsupportedSegmentError(f"no kernel computes qkv for {buckets[-1]} tokens")
        self.asked[self.quantization, kind] = list(buckets)
        return {"first": 700, "middle": 900, "last": 800}[kind]

    def is_ready(self, kind: str, num_tokens: int) -> bool:
        return True


_ALL = {(form, kind) for form in ("none", "fp8") for kind in ("first", "middle", "last")}


@pytest.fixture(autouse=True)
def fake_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_segments, "SegmentFactory", FakeFactory)
    monkeypatch.setattr(FakeFactory, "supported", _ALL)
    monkeypatch.setattr(FakeFactory, "asked", {})


def wide(**changes: object) -> ModelConfig:
    return tiny_config("llama", **({"hidden_size": 2048, "num_attention_heads": 32} | changes))


def choose(quantization: str, model: ModelConfig, checkpoint: Any = None) -> ModelSegments:
    config: Any = RuntimeConfig(Path(), quantization=quantization)  # type: ignore[arg-type]
    nothing: Any = SimpleNamespace(make_current=lambda: None)
    return choose_segments(config, model, nothing, nothing, checkpoint, 64, 8)


class HeldInFp8:
    """A checkpoint of which some projections are in FP8."""

    def __init__(self, others: Sequence[str] = ()) -> None:
        self.holds_fp8 = True
        self._others = others

    def is_fp8(self, name: str) -> bool:
        return "_proj" in name and not any(other in name for other in self._others)


@pytest.mark.parametrize(
    ("asked", "checkpoint", "supported", "expected"),
    [
        ("auto", None, _ALL, None),
        ("auto", HeldInFp8(), _ALL, "fp8 weights"),
        ("auto", HeldInFp8(), _ALL - {("fp8", "last")}, None),
        ("none", HeldInFp8(), _ALL, None),
        ("fp8", None, _ALL, "fp8 weights"),
        ("fp8", HeldInFp8(["layers.1.mlp.down"]), _ALL, "fp8 weights in 2 of 3 segments"),
        (
            "auto",
            HeldInFp8(["layers.0.self_attn.v"]),
            _ALL - {("fp8", "first")},
            "fp8 weights in 2 of 3 segments",
        ),
    ],
)
def test_weights_are_quantized_if_asked_for_or_if_the_checkpoint_is(
    asked: str,
    checkpoint: Any,
    supported: set[tuple[str, str]],
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeFactory, "supported", supported)
    segments = choose(asked, wide(), checkpoint)
    assert segments.describe() == expected
    forms = {"none"} if expected is None else {"fp8"} if expected == "fp8 weights" else {"none", "fp8"}
    assert set(segments.factories) == forms


def test_fp8_that_no_kernel_computes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeFactory, "supported", {("none", kind) for _, kind in _ALL})
    with pytest.raises(UnsupportedDeviceError, match="--quantization none does without"):
        choose("fp8", wide())


@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_workspace_is_that_of_the_segments_and_buckets_that_there_are(num_layers: int) -> None:
    layers = tiny_config("llama").layers[:num_layers]
    model = tiny_config("llama", num_hidden_layers=num_layers, layers=layers)
    segments = choose("none", model)
    assert segments.workspace_bytes == (800 if num_layers == 1 else 900)
    bodies = ["first"] if num_layers == 1 else ["first", "middle"]
    assert FakeFactory.asked.keys() == {("none", kind) for kind in [*bodies, "last"]}
    assert FakeFactory.asked["none", "last"] == [1, 2, 4, 8]
    assert FakeFactory.asked["none", "first"] == [1, 2, 4, 8, 16, 32, 64]


def test_of_wide_models_nothing_is_kept() -> None:
    assert kept_segments(wide(), None) == set()


def test_of_narrow_models_most_is_kept() -> None:
    layers = tiny_config("llama").layers[:1] * 30
    model = tiny_config("llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3,
                        num_hidden_layers=30, layers=layers)  # fmt: skip
    kept = kept_segments(model, None)
    assert {-1, 0, 29} <= kept
    assert len(kept) == 31 - 10
    plan = WeightPlan(model, quantization="fp8", kept=kept)
    assert plan.kinds_of("fp8") == ("middle",)
    assert plan.kinds_of("none") == ("first", "middle", "last")
    assert "layer.mlp.down_proj.weight_scale" in plan.offsets(1)
    assert not any(name.endswith("_scale") for name in plan.offsets(2))


def test_what_a_checkpoint_keeps_is_kept(tmp_path: Path) -> None:
    write_fp8_checkpoint(tmp_path / "model", "modelopt")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert kept_segments(checkpoint.config, checkpoint) == set()

    class Without:
        """The same, with one projection in 16 bits."""

        holds_fp8 = True

        def __init__(self, name: str) -> None:
            self._name = name

        def is_fp8(self, name: str) -> bool:
            return name != self._name and checkpoint.is_fp8(name)

    found = {}
    for name in expected_tensors(checkpoint.config):
        if name.endswith("_proj.weight"):
            without: Any = Without(name)
            (found[name],) = kept_segments(checkpoint.config, without)
    assert found["model.layers.0.self_attn.q_proj.weight"] == -1
    assert found["model.layers.1.self_attn.v_proj.weight"] == 0
    assert found["model.layers.1.self_attn.o_proj.weight"] == 1
    assert found["model.layers.2.mlp.gate_proj.weight"] == 2
    assert isinstance(checkpoint, Checkpoint)
    assert len(found) == 3 * 7


def test_where_kernels_compute_there_is_nothing_to_build() -> None:
    rows, tokens, builds = choose("none", tiny_config("llama")).buckets()
    assert rows.missing == tokens.missing == []
    assert (rows.choose(3), tokens.choose(20)) == (4, 32)
    builds.close()
