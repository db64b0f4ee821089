"""What the GPU executor hands to the device, on plain arrays."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install -e '.[gpu]'")

from engine_runtime.executors.prompt_pool import PromptPool
from engine_runtime.executors.sequence_state import SequenceState
from engine_runtime.executors.sequence_table import Share
from engine_runtime.executors.tensorrt.batch import ArrangedRun, DeviceBatch, StepShape
from engine_runtime.executors.tensorrt.buckets import Buckets
from engine_runtime.kernels.gpu_pooling import PIECE_ROWS
from engine_runtime.kernels.numpy_types import Int32Array
from scheduler.messages import NewSequence, SamplingParams, ScheduledSequence, SchedulerOutput

_BLOCK = 4
_BLOCKS = 6
_POISON = 99


class PlainInputs:
    """The arrays of ``StepInputs`` without a device."""

    table_stride = _BLOCKS

    def __init__(self) -> None:
        self.arrays = {
            name: np.full(64, _POISON, np.int32)
            for name in (
                "query_start",
                "context_len",
                "rows",
                "tiles",
                "token_ids",
                "positions",
                "slots",
                "pieces",
                "widened_starts",
            )
        }
        self.block_tables = np.full((8, _BLOCKS), _POISON, np.int32)

    def __getitem__(self, name: str) -> Int32Array:
        return self.arrays[name]


def _tiles(query_start: Int32Array, context_len: Int32Array, first: int) -> Int32Array:
    """One tile a sequence: sequence, first row, tokens, position."""
    rows = [
        [i, query_start[i], query_start[i + 1] - query_start[i],
         context_len[i] - query_start[i + 1] + query_start[i]]
        for i in range(first, len(context_len))
    ]  # fmt: skip
    return np.array(rows, np.int32).reshape(-1, 4)


def _widened_starts(query_start: Int32Array, context_len: Int32Array, first: int) -> Int32Array:
    """Only for sequences of more than ten tokens."""
    blocks = -(-context_len[first:] // _BLOCK)
    return np.cumsum(blocks, dtype=np.int32) - blocks if context_len.max() > 10 else blocks[:0]


def _batch() -> tuple[DeviceBatch, PlainInputs]:
    inputs = PlainInputs()
    batch = DeviceBatch(
        inputs,  # type: ignore[arg-type]
        max_slots=8,
        max_rows=8,
        block_size=_BLOCK,
        decode_buckets=Buckets((1, 2, 4, 8)),
        token_buckets=Buckets((8, 16, 32)),
        tiles=_tiles,
        widened_starts=_widened_starts,
    )
    return batch, inputs


def _new(name: str, num_tokens: int, *blocks: int, prompt_logprobs: int | None = None) -> NewSequence:
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    tokens = tuple(range(100 * len(name), 100 * len(name) + num_tokens))
    return NewSequence(name, tokens, num_tokens, len(blocks) * _BLOCK, blocks, params)


def _step(
    batch: DeviceBatch,
    *scheduled: ScheduledSequence,
    new: tuple[NewSequence, ...] = (),
    released: tuple[str, ...] = (),
) -> ArrangedRun:
    """Arranges a step of one run, and appends placeholders for sampled tokens as the executor does."""
    (run,) = batch.runs(batch.apply(SchedulerOutput(0, new, scheduled, released)))
    arranged = batch.arrange(run)
    for share in arranged.sampling:
        share.state.token_ids.extend((-1 - batch.slot(share.state),))
    return arranged


def test_sequences_whose_contexts_are_widened() -> None:
    batch, inputs = _batch()
    arranged = _step(
        batch,
        ScheduledSequence("a", 8, 1, (6,), True),
        ScheduledSequence("bb", 4, 2, (5,), False),
        ScheduledSequence("ccc", 0, 11, (1, 3, 4), False),
        new=(_new("a", 9, 0, 7), _new("bb", 9, 2), _new("ccc", 12)),
    )
    assert arranged.shape == StepShape(
        num_tokens=16, num_decodes=1, num_tiles=2, num_rows=1, is_decode=False,
        num_widened=2, most_widened_blocks=3,
    )  # fmt: skip
    assert inputs["widened_starts"][:2].tolist() == [0, 2]


def test_prompts_then_decode() -> None:
    batch, inputs = _batch()
    arranged = _step(
        batch,
        ScheduledSequence("a", 0, 5, (3, 1), True),
        ScheduledSequence("bb", 4, 2, (5,), False),
        new=(_new("a", 5), _new("bb", 9, 2)),
    )
    assert arranged.shape == StepShape(num_tokens=8, num_decodes=0, num_tiles=2, num_rows=1, is_decode=False)
    assert inputs["token_ids"][:8].tolist() == [100, 101, 102, 103, 104, 204, 205, 0]
    assert inputs["positions"][:8].tolist() == [0, 1, 2, 3, 4, 4, 5, 0]
    # Blocks 3 and 1 of "a", then block 5 of "bb", behind its cached block 2; padding is not cached.
    assert inputs["slots"][:8].tolist() == [12, 13, 14, 15, 4, 20, 21, -1]
    assert inputs["query_start"][:3].tolist() == [0, 5, 7]
    assert inputs["context_len"][:2].tolist() == [5, 6]
    assert inputs.block_tables[:2, :2].tolist() == [[3, 1], [2, 5]]
    assert inputs["rows"][:1].tolist() == [4]
    assert inputs["tiles"][:8].tolist() == [0, 0, 5, 0, 1, 5, 2, 4]
    assert [share.state.request_id for share in arranged.sampling] == ["a"]
    assert arranged.positions.tolist() == [5]

    arranged = _step(
        batch,
        ScheduledSequence("a", 5, 1, (), True),
        ScheduledSequence("bb", 6, 3, (0,), True),
    )
    slot_a = batch.slots["a"]
    assert arranged.shape == StepShape(num_tokens=8, num_decodes=1, num_tiles=1, num_rows=2, is_decode=False)
    # What "a" sampled is not known to the host: the device looks it up in the slot.
    assert inputs["token_ids"][:4].tolist() == [-1 - slot_a, 206, 207, 208]
    assert inputs["slots"][:4].tolist() == [5, 22, 23, 0]

    arranged = _step(batch, ScheduledSequence("bb", 9, 1, (), True), ScheduledSequence("a", 6, 1, (), True))
    assert arranged.shape == StepShape(num_tokens=2, num_decodes=2, num_tiles=0, num_rows=2, is_decode=True)
    assert inputs["token_ids"][:2].tolist() == [-1 - batch.slots["bb"], -1 - slot_a]
    assert inputs["positions"][:2].tolist() == [9, 6]
    assert arranged.slots.tolist() == [batch.slots["bb"], slot_a]


def test_forced_tokens_come_behind_the_sampled_one() -> None:
    batch, inputs = _batch()
    _step(batch, ScheduledSequence("a", 0, 3, (3,), True), new=(_new("a", 3),))
    batch.apply(SchedulerOutput(1, (), (), (), forced=(("a", (41, 42)),)))
    arranged = _step(batch, ScheduledSequence("a", 3, 3, (1,), True))
    assert inputs["token_ids"][:3].tolist() == [-1 - batch.slots["a"], 41, 42]
    assert inputs["slots"][:3].tolist() == [15, 4, 5]
    assert inputs["rows"][:1].tolist() == [2]
    assert arranged.positions.tolist() == [6]


def test_a_decode_step_is_padded_with_sequences_of_nothing() -> None:
    batch, inputs = _batch()
    names = ("a", "bb", "ccc")
    arranged = _step(
        batch,
        *(ScheduledSequence(name, 4, 1, (7 - i,), True) for i, name in enumerate(names)),
        new=tuple(_new(name, 5, i) for i, name in enumerate(names)),
    )
    assert arranged.shape == StepShape(num_tokens=4, num_decodes=4, num_tiles=0, num_rows=4, is_decode=True)
    assert inputs["token_ids"][:4].tolist() == [104, 204, 304, 0]
    assert inputs["slots"][:4].tolist() == [28, 24, 20, -1]
    assert inputs["query_start"][:5].tolist() == [0, 1, 2, 3, 3]
    assert inputs["context_len"][:4].tolist() == [5, 5, 5, 0]


def test_slots_are_given_back() -> None:
    batch, _ = _batch()
    for i in range(40):
        _step(
            batch,
            ScheduledSequence(f"r{i}", 0, 2, (0,), True),
            new=(_new(f"r{i}", 2),),
            released=(f"r{i - 1}",) if i else (),
        )
    assert set(batch.slots) == {"r39"}


def test_prompt_rows_come_after_the_sampled_ones() -> None:
    batch, inputs = _batch()
    arranged = _step(
        batch,
        ScheduledSequence("a", 0, 3, (0,), True),
        ScheduledSequence("bb", 0, 3, (1,), True),
        new=(_new("a", 3, prompt_logprobs=2), _new("bb", 3)),
    )
    assert inputs["rows"][:4].tolist() == [2, 5, 0, 1]
    assert arranged.targets == [(101, 2), (102, 2)]
    assert [share.state.request_id for share in arranged.prompt_shares] == ["a"]


def _pooling(name: str, num_tokens: int, kind: Literal["mean", "last"], num_prompt: int = 0) -> NewSequence:
    tokens = tuple(range(num_tokens))
    return NewSequence(name, tokens, num_prompt or num_tokens, 0, (), SamplingParams(pooling=kind))


def test_pooled_rows_come_in_pieces_without_logits() -> None:
    batch, inputs = _batch()
    arranged = _step(
        batch,
        ScheduledSequence("mean", 0, 5, (0, 1), False),
        ScheduledSequence("one", 0, 1, (2,), True),
        ScheduledSequence("last", 0, 4, (3,), False),
        ScheduledSequence("free", 0, 3, (4,), True),
        new=(_pooling("mean", 8, "mean"), _pooling("one", 1, "last"), _pooling("last", 7, "last"),
             _new("free", 3)),
    )  # fmt: skip
    # "one" has one token, so it comes first; "last" has not come to its last token.
    assert inputs["pieces"][:5].tolist() == [0, 1, 1, 5, _POISON]
    assert arranged.shape.num_pieces == 2
    assert [piece.num_rows for piece in arranged.pieces] == [1, 5]
    assert [piece.pool for piece in arranged.pieces] == [batch.pools["one"], batch.pools["mean"]]
    assert inputs["rows"][:2].tolist() == [0, 12]
    assert (arranged.shape.num_rows, arranged.targets) == (2, [])
    assert list(batch.take_pools(arranged.sampling)) == ["one"]

    arranged = _step(
        batch,
        ScheduledSequence("mean", 5, 3, (), True),
        ScheduledSequence("last", 4, 3, (5,), True),
        ScheduledSequence("free", 3, 1, (), True),
    )
    assert inputs["pieces"][:5].tolist() == [1, 3, 6, 1, _POISON]
    assert arranged.pieces[0].pool is batch.pools["mean"]
    assert set(batch.take_pools(arranged.sampling)) == {"mean", "last"}
    assert batch.pools == {}
    arranged = _step(
        batch, ScheduledSequence("mean", 8, 1, (6,), True), ScheduledSequence("one", 1, 1, (), True)
    )
    assert (arranged.shape.is_decode, arranged.shape.num_pieces) == (True, 0)


def test_a_step_of_single_tokens_that_pools_is_no_decode() -> None:
    batch, inputs = _batch()
    arranged = _step(batch, ScheduledSequence("x", 0, 1, (0,), True), new=(_pooling("x", 1, "mean"),))
    assert arranged.shape == StepShape(8, 1, 0, 1, is_decode=False, num_pieces=1)
    assert inputs["pieces"][:3].tolist() == [0, 1, _POISON]


def test_what_was_generated_before_a_preemption_is_not_pooled() -> None:
    batch, inputs = _batch()
    _step(batch, ScheduledSequence("m", 0, 3, (0,), False), new=(_pooling("m", 6, "mean"),))
    first = batch.pools["m"]
    again = _pooling("m", 8, "mean", num_prompt=6)
    batch.apply(SchedulerOutput(1, (), (), ("m",)))
    assert batch.pools == {}
    arranged = _step(batch, ScheduledSequence("m", 0, 8, (0, 1), True), new=(again,))
    assert inputs["pieces"][:3].tolist() == [0, 6, _POISON]
    assert arranged.pieces[0].pool is batch.pools["m"] is not first


def test_long_prompts_are_several_pieces() -> None:
    batch, inputs = _batch()
    share = Share(SequenceState(_pooling("m", 3 * PIECE_ROWS, "mean")), 7, 2 * PIECE_ROWS + 8, 0, False)
    batch.pools["m"] = PromptPool("mean")
    pieces = batch._arrange_pieces([share], np.array([40, 40 + share.stop - share.start], np.int32))
    assert inputs["pieces"][:6].tolist() == [
        40, PIECE_ROWS, 40 + PIECE_ROWS, PIECE_ROWS, 40 + 2 * PIECE_ROWS, 1,
    ]  # fmt: skip
    assert [piece.num_rows for piece in pieces] == [PIECE_ROWS, PIECE_ROWS, 1]


@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_the_place_that_its_block_table_gives(seed: int) -> None:
    """Against a straightforward rendering of random mixed steps."""
    rng = np.random.default_rng(seed)
    batch, inputs = _batch()
    blocks = iter(rng.permutation(100).tolist())
    sequences = {f"{'x' * (i + 1)}": int(rng.integers(2, 12)) for i in range(4)}
    tables: dict[str, list[int]] = {name: [] for name in sequences}
    done = dict.fromkeys(sequences, 0)
    new = tuple(_new(name, length) for name, length in sequences.items())
    for _ in range(6):
        scheduled = []
        for name, length in sequences.items():
            count = min(int(rng.integers(1, 4)), length - done[name])
            if done[name] + count > _BLOCK * _BLOCKS:
                continue
            needed = -(-(done[name] + count) // _BLOCK) - len(tables[name])
            added = tuple(next(blocks) for _ in range(needed))
            tables[name] += added
            scheduled.append(ScheduledSequence(name, done[name], count, added, done[name] + count == length))
        arranged = _step(batch, *scheduled, new=new)
        new = ()
        ordered = scheduled
        if not arranged.shape.is_decode:
            ordered = sorted(scheduled, key=lambda share: share.num_tokens > 1)
        expected = [
            (position, tables[share.request_id][position // _BLOCK] * _BLOCK + position % _BLOCK)
            for share in ordered
            for position in range(share.start, share.start + share.num_tokens)
        ]
        number = len(expected)
        found = zip(inputs["positions"][:number].tolist(), inputs["slots"][:number].tolist(), strict=True)
        assert list(found) == expected
        assert (inputs["slots"][number : arranged.shape.num_tokens] == -1).all()
        for share in scheduled:
            done[share.request_id] += share.num_tokens
            if share.samples:
                sequences[share.request_id] += 1
