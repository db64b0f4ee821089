"""Which kernels may compute which projection."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[kernels]'")

from engine_runtime.executors.tensorrt.gemm_form import parse_forms
from engine_runtime.executors.tensorrt.kernel_cost import MOST_TIMED, predicted_microseconds
from engine_runtime.executors.tensorrt.kernel_forms import (
    Projection,
    Quantization,
    candidates,
    is_computable,
    projections,
)
from engine_runtime.kernels.triton import segment_gemm_specs, segment_hopper_specs, segment_rows
from engine_runtime.model_config import ModelConfig
from tests.engine_runtime.tiny_configs import tiny_config

GEMMS = (*segment_gemm_specs.SPECS, *segment_hopper_specs.SPECS)
NAMES = {
    architecture: [spec.name for spec in (*GEMMS, *segment_rows.SPECS) if architecture in spec.architectures]
    for architecture in (80, 89, 90)
}


def config_8b(**changes: object) -> ModelConfig:
    sizes: dict[str, object] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 128256,
    }  # fmt: skip
    return tiny_config("llama", **(sizes | changes))


def test_names_hold_what_was_compiled() -> None:
    for spec in GEMMS:
        (form,) = parse_forms([spec.name])
        constants = spec.constexprs
        assert form.bn == constants["BN"]
        assert form.bk == constants["BK"]
        assert form.bm == constants.get("BM", 1)
        assert form.num_parts == constants.get("SPLIT", 1)
        if form.function in ("hopper", "thin"):
            blocks = spec.signature["w"], spec.signature["x"]
            groups, rest = constants["GROUPS"], constants.get("REST", 0)
            x_rows = rest or form.bm if form.function == "thin" else form.bm // groups
            w_rows = form.bn // (2 * groups if form.function == "thin" and constants["ACTIVATION"] else 2)
            assert f"[{w_rows}, {form.bk}]" in blocks[0]
            assert f"[{x_rows}, {form.bk}]" in blocks[1]
            assert (form.bm - rest) % x_rows == 0
            assert form.columns == (form.bn // 2 if constants["ACTIVATION"] else form.bn)
        assert form.is_fp8 == constants["SCALED"]
        assert form.writes_float32 == (spec.signature["out"] == "*fp32:16")
    assert parse_forms(spec.name for spec in segment_rows.SPECS) == ()


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize(
    "num_tokens", [1, 2, 16, 17, 32, 33, 64, 65, 100, 128, 160, 192, 200, 256, 384, 512, 1024, 8192]
)
def test_hopper_has_a_form_for_any_number_of_tokens(num_tokens: int, quantization: str) -> None:
    known = parse_forms(NAMES[90])
    sizes = ({}, {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "head_dim": 64})
    for changes in sizes:
        config = config_8b(**{"num_key_value_heads": 3, **changes} if changes else {})
        for kind in ("first", "middle", "last"):
            for projection, shape in projections(config, kind).items():
                found = candidates(known, config, kind, projection, num_tokens, 132, quantization)
                assert found
                assert all(shape.k % (form.bk * form.num_parts) == 0 for form in found)
                assert all(form.bm >= min(num_tokens, 64) for form in found if form.function != "gemv")


@pytest.mark.parametrize("architecture", [80, 89])
def test_other_gpus_have_forms_for_few_tokens(architecture: int) -> None:
    known = parse_forms(NAMES[architecture])
    for num_tokens in (1, 16, 32, 64):
        for projection in projections(config_8b(), "middle"):
            assert candidates(known, config_8b(), "middle", projection, num_tokens, 108)
    assert not candidates(known, config_8b(), "middle", "qkv", 65, 108)


@pytest.mark.parametrize(("quantization", "blocks"), [("none", "8x512x3x4"), ("fp8", "8x512x4x2")])
def test_one_token_takes_what_was_fastest(quantization: Quantization, blocks: str) -> None:
    known = parse_forms(NAMES[90])
    for projection in projections(config_8b(), "middle"):
        found = candidates(known, config_8b(), "middle", projection, 1, 132, quantization)
        assert all(form.function == "gemv" for form in found)
        assert len(found) <= MOST_TIMED  # the order is a guess, and all of them are timed
        assert found[0].name.endswith(f"_1x{blocks}")


def test_the_best_predicted_form_is_the_first() -> None:
    known = parse_forms(NAMES[90])
    shapes = projections(config_8b(), "middle")
    expected: tuple[tuple[Projection, int, str], ...] = (
        ("gate_up", 96, "thin_silu_96x256x64x4x4"),
        ("qkv", 160, "thin_plain_160x64x64x7x4"),
        ("mlp_output", 1024, "hopper_plain_128x256x64x4x4"),
        ("mlp_output", 1152, "hopper_plain_192x128x64x5x4"),
    )
    for projection, num_tokens, name in expected:
        found = candidates(known, config_8b(), "middle", projection, num_tokens, 132)
        shape = shapes[projection]
        times = [predicted_microseconds(form, shape.n, shape.k, num_tokens, 132) for form in found]
        assert times == sorted(times)
        assert found[0].name == name


def test_the_output_projection_keeps_16_bits() -> None:
    known = parse_forms(NAMES[90])
    for num_tokens in (1, 16, 256):
        found = candidates(known, config_8b(), "last", "logits", num_tokens, 132, "fp8")
        assert found
        assert not any(form.is_fp8 for form in found)


def test_what_kernels_do_not_compute() -> None:
    assert is_computable(config_8b(), "last")
    assert not is_computable(config_8b(has_o_bias=True), "middle")
    assert not is_computable(config_8b(has_mlp_bias=True), "last")
    assert not is_computable(config_8b(intermediate_size=14337), "middle")


def test_an_odd_vocabulary_or_a_cap_concerns_the_last_segment_only() -> None:
    for config in (config_8b(vocab_size=32001), config_8b(final_logit_softcap=30.0)):
        assert is_computable(config, "middle")
        assert not is_computable(config, "last")
