"""Which segment computes which layer; the device is a list of names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install -e '.[gpu]'")

from engine_runtime.executors.tensorrt import decoder as decoder_module
from engine_runtime.executors.tensorrt.batch import StepShape
from engine_runtime.executors.tensorrt.decoder import DeviceDecoder, _lender
from engine_runtime.kernels.sampling_rows import SamplingPath
from tests.engine_runtime.executors.cuda_errors import cuda_error
from tests.engine_runtime.tiny_configs import tiny_config

_FORMS = {-1: "none", 0: "fp8", 1: "none", 2: "fp8", 3: "none"}


class NamedSegments:
    """Segments that say what they were bound to."""

    def __init__(self, form: str) -> None:
        self.made: list[tuple[str, int]] = []
        self._form = form

    def make(self, kind: str, num_tokens: int) -> Any:
        self.made.append((kind, num_tokens))
        name = f"{self._form} {kind} {num_tokens}"
        return SimpleNamespace(
            workspace_bytes=7,
            use_workspace=lambda address: None,
            bind=lambda addresses: (name, addresses["weights"], addresses["attention"]),
        )


def _decoder() -> tuple[Any, dict[str, NamedSegments]]:
    decoder: Any = DeviceDecoder.__new__(DeviceDecoder)
    factories = {form: NamedSegments(form) for form in ("none", "fp8")}
    layers = tiny_config("llama").layers[:1] * 4
    decoder._config = tiny_config("llama", num_hidden_layers=4, layers=layers)
    decoder._segments = factories
    decoder._weights = SimpleNamespace(
        quantization_of=_FORMS.__getitem__, addresses=lambda layer: {"weights": layer}
    )
    names = ("residual.0", "residual.1", "attention", "qkv", "logits", "row_attention", "row_residual")
    decoder._at = {name: name for name in names}
    decoder._workspaces = [SimpleNamespace(num_bytes=100, address=256)]
    decoder._bodies, decoder._heads, decoder._endings = {}, {}, {}
    decoder._lender = _lender(decoder._config, decoder._weights)
    return decoder, factories


def test_each_layer_gets_a_segment_of_the_form_of_its_weights() -> None:
    decoder, factories = _decoder()
    assert decoder._body(16) == [
        ("none first 16", -1, "attention"),
        ("fp8 middle 16", 0, "attention"),
        ("none middle 16", 1, "attention"),
        ("fp8 middle 16", 2, "attention"),
    ]
    assert decoder._body(16) is decoder._body(16)
    assert factories["none"].made == [("first", 16), ("middle", 16)]
    assert factories["fp8"].made == [("middle", 16)]


def test_the_head_reads_gathered_rows_unless_all_tokens_sample() -> None:
    decoder, factories = _decoder()
    assert decoder._head(8, is_decode=True) == ("none last 8", 3, "attention")
    assert decoder._head(8, is_decode=False) == ("none last 8", 3, "row_attention")
    assert factories["fp8"].made == []


def test_the_ending_is_a_middle_segment_of_the_last_layers_weights() -> None:
    decoder, factories = _decoder()
    assert decoder._lender == 1
    bound: dict[str, Any] = {}

    def make(kind: str, num_tokens: int) -> Any:
        return SimpleNamespace(workspace_bytes=0, use_workspace=lambda address: None, bind=bound.update)

    factories["none"].make = make  # type: ignore[method-assign]
    decoder._weights.addresses = lambda layer: {
        f"{'layer' if layer == 3 else 'other layer'}.mlp": layer,
        ("norm.weight" if layer == 3 else "next_layer.self_attn"): layer,
        "layer.self_attn": layer,
    }
    decoder._ending(16)
    assert (bound["layer.self_attn"], bound["layer.mlp"], bound["next_layer.self_attn"]) == (3, 3, 1)
    assert (bound["residual"], bound["residual_out"]) == ("residual.1", "residual.0")
    assert (bound["attention"], bound["qkv"]) == ("attention", "qkv")


@pytest.mark.parametrize(
    ("forms", "lender"),
    [("nn", 0), ("nfn", 0), ("fnn", 1), ("ffn", None), ("n", None)],
)
def test_who_lends_weights(forms: str, lender: int | None) -> None:
    layers = tiny_config("llama").layers[:1] * len(forms)
    config = tiny_config("llama", num_hidden_layers=len(forms), layers=layers)
    weights: Any = SimpleNamespace(quantization_of=forms.__getitem__)
    assert _lender(config, weights) == lender


def test_steps_that_cannot_be_recorded_are_enqueued_and_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(stream: Any, enqueue: Any) -> None:
        raise cuda_error("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", is_fatal=False)

    monkeypatch.setattr(decoder_module, "CudaGraph", refuse)
    decoder, _ = _decoder()
    decoder._stream, decoder._graphs, decoder._unrecordable = None, {}, set()
    enqueued: list[int] = []
    monkeypatch.setattr(decoder, "_enqueue", lambda shape, path: enqueued.append(shape.num_tokens))
    for num_tokens in (4, 4, 4, 2, 4):
        decoder.run(StepShape(num_tokens, num_tokens, 0, num_tokens, is_decode=True), SamplingPath.GREEDY)
    assert enqueued == [4, 4, 4, 2, 4]
    assert len(caplog.records) == 1
    assert "steps of 4 sequences cannot be recorded" in caplog.text
