"""What is predicted of matrix products, beside what was measured.

``gemm_times.csv``: microseconds of every form on two H200s, 2026-11-22, with the norm behind the two
projections that have one. The constants were fitted to llama-8b and to qwen3-0.6b without FP8, not to others.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from engine_runtime.executors.tensorrt.gemm_form import GemmForm, parse_forms
from engine_runtime.executors.tensorrt.kernel_cost import MOST_TIMED, best_first, predicted_microseconds

_NUM_MULTIPROCESSORS = 132


@pytest.fixture(scope="module")
def ratios() -> dict[tuple[str, str], list[tuple[float, float]]]:
    """For each shape and quantization, for each size: the segment as predicted, and with the best of those
    that the tuner would time, over the fastest."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    with (Path(__file__).parent / "gemm_times.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            times = {name: float(us) for name, us in (way.split("=") for way in row["microseconds"].split())}
            n, k, num_tokens = int(row["n"]), int(row["k"]), int(row["tokens"])
            order = best_first(parse_forms(times), n, k, num_tokens, _NUM_MULTIPROCESSORS)
            found = sums[row["shape"], row["quantization"], row["tokens"]]
            found[0] += times[order[0].name]
            found[1] += min(times[form.name] for form in order[:MOST_TIMED])
            found[2] += min(times.values())
    result = defaultdict(list)
    for (shape, quantization, _tokens), (predicted, timed, best) in sums.items():
        result[shape, quantization].append((predicted / best, timed / best))
    return result


def test_the_first_form_is_nearly_the_fastest(
    ratios: dict[tuple[str, str], list[tuple[float, float]]],
) -> None:
    assert len(ratios) == 8
    for name, sizes in ratios.items():
        first = [predicted for predicted, _ in sizes]
        assert len(first) == 6
        assert max(first) < 1.18, (name, first)
        assert sum(first) / len(first) < 1.1, (name, first)
    fitted = [
        predicted for name in (("llama-8b", "none"), ("llama-8b", "fp8")) for predicted, _ in ratios[name]
    ]
    assert max(fitted) < 1.04, fitted


def test_the_fastest_is_among_those_that_are_timed(
    ratios: dict[tuple[str, str], list[tuple[float, float]]],
) -> None:
    for name, sizes in ratios.items():
        assert all(timed < 1.02 for _, timed in sizes), (name, sizes)


def _form(name: str) -> GemmForm:
    (form,) = parse_forms([name])
    return form


def test_more_of_anything_takes_more_time() -> None:
    for name in ("hopper_silu_128x256x64x4x4", "thin_plain_96x64x64x10x4", "tiled_parts4_128x128x128x3x8"):
        form = _form(name)
        base = predicted_microseconds(form, 32768, 4096, 96, 132)
        assert predicted_microseconds(form, 65536, 4096, 96, 132) > base
        assert predicted_microseconds(form, 32768, 16384, 96, 132) > base
        assert predicted_microseconds(form, 32768, 4096, 96, 16) > base


def test_a_round_of_tiles_costs_the_same_until_it_is_full() -> None:
    form = _form("hopper_plain_128x128x64x6x4")
    times = [predicted_microseconds(form, 128 * columns, 8192, 1024, 132) for columns in (12, 16, 17)]
    assert times[0] == times[1]  # 96 and 128 tiles
    assert times[2] > 1.8 * times[1]  # 136


def test_few_tokens_take_the_time_of_the_weights() -> None:
    form = _form("thin_silu_16x128x256x3x4")
    weights = 2 * 14336 * 4096 * 2  # bytes
    assert predicted_microseconds(form, 14336, 4096, 16, 132) == pytest.approx(weights / 4.0e6)
