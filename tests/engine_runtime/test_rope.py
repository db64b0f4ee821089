"""Rotary tables against transformers' frequencies and against a rotation written with complex numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine_runtime.rope import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    YarnScaling,
    inverse_frequencies,
    rope_tables,
)
from engine_runtime.weights.hf_config import read_hf_config
from tests.reference.recordings import FOLDER
from tests.reference.rope_cases import ROPE_CASES


@pytest.mark.parametrize("case", sorted(ROPE_CASES))
def test_frequencies_and_amplitude_are_those_of_transformers(case: str) -> None:
    with np.load(FOLDER / "rope.npz") as recorded:
        expected = recorded[f"{case}.inverse_frequencies"]
        amplitude = float(recorded[f"{case}.attention_factor"])
    config = read_hf_config(ROPE_CASES[case])
    rope = config.layers[0].rope
    np.testing.assert_allclose(inverse_frequencies(rope, config.head_dim), expected, rtol=1e-6)
    cos, _ = rope_tables(rope, config.head_dim, 1)
    np.testing.assert_allclose(cos[0], amplitude, rtol=1e-6)


def test_every_scaling_has_a_case() -> None:
    scalings = {type(read_hf_config(case).layers[0].rope.scaling) for case in ROPE_CASES.values()}
    assert scalings == {type(None), LinearScaling, Llama3Scaling, YarnScaling}


def test_tables_hold_the_angle_of_each_position_and_pair() -> None:
    cos, sin = rope_tables(RopeConfig(theta=100.0), head_dim=4, max_len=3)
    assert (cos.dtype, sin.dtype, cos.shape, sin.shape) == (np.float32, np.float32, (3, 2), (3, 2))
    for position in range(3):
        for pair, angle in enumerate((position, position / 10)):
            assert cos[position, pair] == pytest.approx(math.cos(angle), abs=1e-7)
            assert sin[position, pair] == pytest.approx(math.sin(angle), abs=1e-7)


def test_tables_stay_exact_at_far_positions() -> None:
    position = 131_071
    cos, _ = rope_tables(RopeConfig(theta=10_000.0), head_dim=64, max_len=position + 1)
    exact = [math.cos(position / 10_000 ** (2 * pair / 64)) for pair in range(32)]
    np.testing.assert_allclose(cos[position], exact, atol=1e-7)


def test_rotated_products_depend_on_the_distance_only() -> None:
    cos, sin = rope_tables(RopeConfig(theta=10_000.0), head_dim=32, max_len=64)
    turns = cos + 1j * sin
    random = np.random.RandomState(0)
    query, key = random.standard_normal((2, 16)) + 1j * random.standard_normal((2, 16))

    def product(at_query: int, at_key: int) -> float:
        return float(np.vdot(key * turns[at_key], query * turns[at_query]).real)

    assert product(40, 33) == pytest.approx(product(7, 0), rel=1e-5)
    assert product(40, 33) != pytest.approx(product(8, 0), rel=1e-2)


def test_frequency_factors_divide() -> None:
    rope = RopeConfig(10_000.0, FrequencyFactors((1.0, 2.0, 4.0, 8.0)))
    plain = inverse_frequencies(RopeConfig(10_000.0), 8)
    np.testing.assert_allclose(inverse_frequencies(rope, 8), plain / [1, 2, 4, 8])
    with pytest.raises(ValueError, match="4 rope frequency factors for a head of 16"):
        inverse_frequencies(rope, 16)
