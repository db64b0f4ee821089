"""When a sequence ends, and how its prompt's log probabilities are put together."""

from __future__ import annotations

import pytest

from scheduler.messages import FinishReason, Request, SamplingParams, TokenLogprobs
from scheduler.sequence import Sequence


def sequence(max_num_tokens: int = 100, **params: object) -> Sequence:
    return Sequence(Request("r", (1, 2, 3), SamplingParams(**params)), 0, max_num_tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        pytest.param(sequence(max_tokens=3), FinishReason.LENGTH, id="max_tokens"),
        pytest.param(sequence(max_num_tokens=6, max_tokens=50), FinishReason.LENGTH, id="context"),
        pytest.param(sequence(max_tokens=50, stop_token_ids=(9, 7)), FinishReason.STOP, id="stop token"),
        pytest.param(sequence(max_tokens=3, stop_token_ids=(7,)), FinishReason.STOP, id="both"),
        pytest.param(
            sequence(max_tokens=50, stop_token_ids=(7,), min_tokens=2), FinishReason.STOP, id="minimum met"
        ),
        pytest.param(sequence(stop_token_ids=(7,), min_tokens=3), None, id="minimum not met"),
        pytest.param(sequence(max_tokens=50), None, id="goes on"),
    ],
)
def test_the_third_token_is_the_last(one: Sequence, expected: FinishReason | None) -> None:
    assert one.append(5) is None
    assert one.append(6) is None
    assert one.append(7) is expected
    assert one.token_ids == [1, 2, 3, 5, 6, 7]


def test_prompt_logprobs_that_a_recomputation_repeats_are_dropped() -> None:
    records = tuple(TokenLogprobs(token_id, -1.0, 1) for token_id in range(7))
    one = sequence()
    one.add_prompt_logprobs(0, records[:3])
    one.add_prompt_logprobs(0, records[:2])
    one.add_prompt_logprobs(2, records[2:5])
    one.add_prompt_logprobs(5, records[5:])
    assert tuple(one.prompt_logprobs) == records
