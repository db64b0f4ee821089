from __future__ import annotations

from engine_runtime.executors.sequence_state import GrowingArray, SequenceState
from scheduler.messages import NewSequence, SamplingParams


def test_array_keeps_what_is_appended_over_many_growths() -> None:
    array = GrowingArray((1, 2, 3))
    expected = [1, 2, 3]
    for i in range(200):
        values = list(range(i, i + i % 7))
        array.extend(values)
        expected += values
        assert len(array) == len(expected)
        assert array.view.tolist() == expected


def test_state_starts_with_prompt_and_cached_blocks() -> None:
    state = SequenceState(NewSequence("a", (5, 6, 7), 2, 0, (4,), SamplingParams()))
    assert (state.request_id, state.num_prompt_tokens) == ("a", 2)
    assert state.token_ids.view.tolist() == [5, 6, 7]
    assert state.block_ids.view.tolist() == [4]
