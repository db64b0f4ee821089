from __future__ import annotations

from itertools import pairwise

import pytest

from engine_runtime.executors.onnxruntime.input_batch import InputBatch
from engine_runtime.executors.sequence_table import Share, mask_rows
from scheduler.messages import NewSequence, SamplingParams, ScheduledSequence, SchedulerOutput, TokenMasks


def _new(name: str, num_tokens: int, num_prompt: int, prompt_logprobs: int | None = None) -> NewSequence:
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    first = 100 * (1 + ord(name) - ord("a"))
    return NewSequence(name, tuple(range(first, first + num_tokens)), num_prompt, 0, (), params)


def _step(
    new: tuple[NewSequence, ...], *scheduled: ScheduledSequence, released: tuple[str, ...] = ()
) -> SchedulerOutput:
    return SchedulerOutput(0, new, scheduled, released)


def _batch(max_rows: int = 8) -> InputBatch:
    return InputBatch(max_num_seqs=4, max_tokens=64, max_rows=max_rows, max_blocks=4)


def test_arranges_tokens_contexts_blocks_and_sampled_rows() -> None:
    batch = _batch()
    shares = batch.apply(
        _step(
            (_new("a", 20, 20), _new("b", 5, 5)),
            ScheduledSequence("a", 16, 4, (7, 3), True),
            ScheduledSequence("b", 0, 3, (9,), False),
        )
    )
    token_ids, layout, rows = batch.arrange(shares)
    assert token_ids.tolist() == [116, 117, 118, 119, 200, 201, 202]
    assert layout.query_start.tolist() == [0, 4, 7]
    assert layout.context_len.tolist() == [20, 3]
    assert layout.block_tables[0, :2].tolist() == [7, 3]
    assert layout.block_tables[1, :1].tolist() == [9]
    assert rows.tolist() == [3]


def test_blocks_and_sampled_tokens_are_kept_between_steps() -> None:
    batch = _batch()
    batch.apply(_step((_new("a", 3, 3),), ScheduledSequence("a", 0, 3, (5,), True)))
    batch.states["a"].token_ids.extend((42,))
    shares = batch.apply(_step((), ScheduledSequence("a", 3, 1, (6,), True)))
    token_ids, layout, rows = batch.arrange(shares)
    assert (token_ids.tolist(), rows.tolist()) == ([42], [0])
    assert layout.context_len.tolist() == [4]
    assert layout.block_tables[0, :2].tolist() == [5, 6]


def test_release_comes_before_a_new_sequence_of_the_same_name() -> None:
    batch = _batch()
    batch.apply(_step((_new("a", 3, 3),), ScheduledSequence("a", 0, 3, (5,), False)))
    shares = batch.apply(_step((_new("a", 2, 2),), ScheduledSequence("a", 0, 2, (8,), True), released=("a",)))
    _, layout, _ = batch.arrange(shares)
    assert layout.block_tables[0, 0] == 8
    batch.apply(_step((), released=("a", "never seen")))
    assert not batch.states


def test_unknown_sequence_is_an_error() -> None:
    with pytest.raises(KeyError):
        _batch().apply(_step((), ScheduledSequence("a", 0, 1, (), True)))


@pytest.mark.parametrize(
    ("start", "count", "expected"),
    [(0, 10, 9), (0, 4, 4), (4, 6, 5), (9, 1, 0), (10, 1, 0), (8, 4, 1)],
    ids=["whole", "first chunk", "last chunk", "last token", "decode", "past the end"],
)
def test_prompt_rows_are_those_whose_next_token_is_prompt(start: int, count: int, expected: int) -> None:
    batch = _batch()
    (share,) = batch.apply(
        _step((_new("a", 12, 10, prompt_logprobs=0),), ScheduledSequence("a", start, count, (1,), False))
    )
    assert share.num_prompt_rows == expected


def _coverage(runs: list[list[Share]]) -> dict[str, list[tuple[int, int]]]:
    covered: dict[str, list[tuple[int, int]]] = {}
    for run in runs:
        for share in run:
            covered.setdefault(share.state.request_id, []).append((share.start, share.stop))
    return covered


@pytest.mark.parametrize("max_rows", [4, 5, 7, 8, 23, 24, 40])
def test_runs_hold_no_more_rows_than_fit_and_lose_nothing(max_rows: int) -> None:
    batch = _batch(max_rows)
    shares = batch.apply(
        _step(
            (_new("a", 20, 20, 1), _new("b", 9, 9), _new("c", 6, 6, 0), _new("d", 7, 7)),
            ScheduledSequence("a", 0, 20, (1,), True),
            ScheduledSequence("b", 0, 9, (2,), True),
            ScheduledSequence("c", 1, 2, (3,), False),
            ScheduledSequence("d", 0, 7, (4,), True),
        )
    )
    runs = list(batch.runs(shares))
    assert all(0 < sum(share.num_rows for share in run) <= max_rows for run in runs)
    assert sum(share.num_prompt_rows for run in runs for share in run) == 19 + 0 + 2 + 0
    assert [s.state.request_id for run in runs for s in run if s.samples] == ["a", "b", "d"]
    for name, (start, stop) in {"a": (0, 20), "b": (0, 9), "c": (1, 3), "d": (0, 7)}.items():
        pieces = _coverage(runs)[name]
        assert (pieces[0][0], pieces[-1][1]) == (start, stop)
        assert all(first[1] == second[0] for first, second in pairwise(pieces))


def test_a_step_without_prompt_logprobs_is_one_run() -> None:
    batch = _batch(4)
    shares = batch.apply(
        _step(
            tuple(_new(name, 9, 9) for name in "abcd"),
            *(ScheduledSequence(name, 0, 9, (1,), True) for name in "abcd"),
        )
    )
    assert [len(run) for run in batch.runs(shares)] == [4]


def test_forced_tokens_come_behind_the_sampled_one() -> None:
    batch = _batch()
    batch.apply(_step((_new("a", 3, 3),), ScheduledSequence("a", 0, 3, (5,), True)))
    batch.states["a"].token_ids.extend((40,))
    forced = SchedulerOutput(1, (), (ScheduledSequence("a", 3, 3, (6,), True),), (), (("a", (41, 42)),))
    token_ids, layout, rows = batch.arrange(batch.apply(forced))
    assert token_ids.tolist() == [40, 41, 42]
    assert layout.context_len.tolist() == [6]
    assert rows.tolist() == [2]


def test_masks_are_rows_of_words() -> None:
    bits = (1).to_bytes(4, "little") + (2**31).to_bytes(4, "little") + bytes(4) + b"\xff" * 4
    rows = mask_rows(TokenMasks(("a", "b"), bits))
    assert rows["a"].tolist() == [1, -(2**31)]
    assert rows["b"].tolist() == [0, -1]
    assert mask_rows(None) == {}
