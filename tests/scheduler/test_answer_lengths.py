"""The estimate of how long answers get: against another way to work out the same one."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from scheduler.answer_lengths import AnswerLengths
from scheduler.messages import Request, SamplingParams
from scheduler.sequence import Sequence


def _ended(
    lengths: AnswerLengths, num_tokens: int, *, is_cut: bool = False, stop: tuple[int, ...] = (9,)
) -> None:
    params = SamplingParams(max_tokens=num_tokens if is_cut else 5000, stop_token_ids=stop)
    lengths.ended(Sequence(Request("r", (1,), params, generated_token_ids=(2,) * num_tokens), 1, 10_000))


def _redistributed(ends: list[int], cut: list[int]) -> dict[int, Fraction]:
    """Efron's way to Kaplan and Meier's estimate: the weight of each one cut goes to all that got longer."""
    everybody = sorted([(length, 0) for length in ends] + [(length, 1) for length in cut])
    weights = [Fraction(1, len(everybody))] * len(everybody)
    for position, (_, is_cut) in enumerate(everybody[:-1]):
        if is_cut:
            behind = len(everybody) - position - 1
            for later in range(position + 1, len(everybody)):
                weights[later] += weights[position] / behind
            weights[position] = Fraction(0)
    parts: dict[int, Fraction] = {}
    for (length, _), weight in zip(everybody, weights, strict=True):
        parts[length] = parts.get(length, Fraction(0)) + weight
    return parts


@pytest.mark.parametrize("seed", range(20))
def test_who_was_cut_or_still_runs_counts_for_what_comes_later(seed: int) -> None:
    dice = random.Random(seed)
    lengths = AnswerLengths()
    ends, cut = [], []
    for _ in range(64):
        length, is_cut = dice.randint(1, 40), dice.random() < 0.3
        _ended(lengths, length, is_cut=is_cut)
        (cut if is_cut else ends).append(length)
    running = [dice.randint(0, 30) for _ in range(dice.randint(0, 20))]
    ends.append(41)
    _ended(lengths, 41)  # the longest of all; the first one is forgotten for it
    first_cut = random.Random(seed)
    first_length, was_cut = first_cut.randint(1, 40), first_cut.random() < 0.3
    (cut if was_cut else ends).remove(first_length)
    parts = _redistributed(ends, cut + running)
    for unit in (1, 4):
        survival = lengths.survival(running, unit)
        for count, part in enumerate(survival):
            expected = sum(weight for length, weight in parts.items() if length >= count * unit)
            assert part == pytest.approx(float(expected), abs=1e-9)
        assert survival[-1] == 0
        assert len(survival) == 41 // unit + 2


def test_who_runs_is_never_expected_to_have_ended() -> None:
    lengths = AnswerLengths()
    for _ in range(64):
        _ended(lengths, 10)
    survival = lengths.survival([10, 200], 10)
    assert all(survival[:21])
    assert survival[11] == survival[20]
    assert 200 < len(survival) * 10 < 400  # it may go on, but not for ever


def test_answers_that_cannot_stop_say_nothing_about_others() -> None:
    lengths = AnswerLengths()
    before = lengths.survival([], 16)
    for _ in range(64):
        _ended(lengths, 3, is_cut=True, stop=())
    assert lengths.survival([], 16) == before
