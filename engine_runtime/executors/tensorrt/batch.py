"""From the scheduler's step to what one run of the decoder reads on the device."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine_runtime.cuda import DeviceBuffer, PinnedBuffer, Stream
from engine_runtime.executors.prompt_pool import PromptPool
from engine_runtime.executors.sequence_state import SequenceState
from engine_runtime.executors.sequence_table import SequenceTable, Share
from engine_runtime.executors.tensorrt.buckets import Buckets
from engine_runtime.kernels.gpu_pooling import PIECE_ROWS, most_pieces
from engine_runtime.kernels.numpy_types import Int32Array
from scheduler.messages import SamplingParams, SchedulerOutput

_ALIGNMENT = 256


class StepInputs:
    """The input arrays of a step: their places in device memory, and pinned memory to copy them from.

    There are as many pinned copies as steps may be in flight; ``turn`` takes the next one.

    Attributes:
        table_stride: columns of ``block_tables``, which lie apart, since only their first columns are copied.
        most_pieces: rows of ``pieces``.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        max_tiles: int,
        sampling_bytes: int,
        num_copies: int,
    ) -> None:
        """
        Raises:
            CudaError: no memory on the device, or none that can be locked.
        """
        sizes = {
            "sampling": sampling_bytes,
            "query_start": 4 * (max_num_seqs + 1),
            "context_len": 4 * max_num_seqs,
            "rows": 4 * max_rows,
            "tiles": 16 * max_tiles,
            "widened_starts": 4 * max_num_seqs,
            "token_ids": 4 * max_tokens,
            "positions": 4 * max_tokens,
            "slots": 4 * max_tokens,
            "pieces": 8 * most_pieces(max_tokens, max_num_seqs),
        }
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, size in sizes.items():
            self._places[name] = end, size
            end = -(-(end + size) // _ALIGNMENT) * _ALIGNMENT
        self._num_bytes = end
        self.most_pieces = most_pieces(max_tokens, max_num_seqs)
        self.table_stride = max_blocks
        table_bytes = 4 * max_num_seqs * max_blocks
        self._device = DeviceBuffer(end + table_bytes)
        self._pinned = [PinnedBuffer(end + table_bytes) for _ in range(num_copies)]
        self._turn = 0
        self.turn()

    def address(self, name: str) -> int:
        """Of an array on the device."""
        return self._device.address + self._places[name][0]

    @property
    def block_tables_address(self) -> int:
        return self._device.address + self._num_bytes

    def turn(self) -> None:
        """Takes the next pinned copy, which the device must have read."""
        self._turn = (self._turn + 1) % len(self._pinned)
        memory = self._pinned[self._turn].array
        self._views: dict[str, Int32Array] = {
            name: memory[start : start + size].view(np.int32)
            for name, (start, size) in self._places.items()
            if name != "sampling"
        }
        start, size = self._places["sampling"]
        self.sampling: npt.NDArray[np.uint8] = memory[start : start + size]
        self.block_tables: Int32Array = (
            memory[self._num_bytes :].view(np.int32).reshape(-1, self.table_stride)
        )

    def __getitem__(self, name: str) -> Int32Array:
        """The pinned copy of an array."""
        return self._views[name]

    def copy(self, stream: Stream, num_sequences: int, num_blocks: int) -> None:
        """Enqueues the copies to the device.

        Args:
            num_blocks: columns of the block tables that are used.
        """
        pinned = self._pinned[self._turn].address
        stream.copy_to_device(self._device.address, pinned, self._num_bytes)
        if num_sequences and num_blocks:
            stream.copy_rows_to_device(
                self.block_tables_address,
                pinned + self._num_bytes,
                num_sequences,
                4 * num_blocks,
                4 * self.table_stride,
            )

    def free(self) -> None:
        self._device.free()
        for buffer in self._pinned:
            buffer.free()


@dataclass(frozen=True, slots=True)
class StepShape:
    """What decides how a run is launched.

    Attributes:
        num_tokens: a bucket.
        num_decodes: sequences that come first and have one token each; with ``is_decode`` a bucket.
        num_tiles: of the other sequences, see ``PagedAttention.prefill_tiles``.
        num_rows: of logits, a bucket.
        is_decode: every sequence has one token and samples, so that rows and tokens are the same.
        num_pieces: of sequences whose final hidden states are added up; none with ``is_decode``.
        num_widened, most_widened_blocks: the other sequences if their contexts are widened, and the blocks of
            the longest; see ``Widening``.
    """

    num_tokens: int
    num_decodes: int
    num_tiles: int
    num_rows: int
    is_decode: bool
    num_pieces: int = 0
    num_widened: int = 0
    most_widened_blocks: int = 0


@dataclass(frozen=True, slots=True)
class PooledPiece:
    """Rows of a run whose final hidden states are added up, for ``pool``."""

    pool: PromptPool
    num_rows: int


@dataclass(frozen=True, slots=True)
class ArrangedRun:
    """A run whose inputs were written.

    Attributes:
        sampling: the shares that sample, in order; so are their rows of logits, which come first.
        prompt_shares: those with rows of prompt tokens, in order.
        slots, positions: of ``sampling``: int32 [n]; how many tokens precede the sampled one.
        targets: (token id, top_n) of the rows of prompt tokens.
        pieces: what is added up, in the order of the sums.
    """

    shape: StepShape
    sampling: Sequence[Share]
    prompt_shares: Sequence[Share]
    slots: Int32Array
    positions: Int32Array
    targets: Sequence[tuple[int, int]]
    num_sequences: int
    num_blocks: int
    pieces: Sequence[PooledPiece] = ()


class DeviceBatch(SequenceTable):
    """The sequences, each with a slot: a small number for its place in the sampler's memory and in tables.

    A sampled token is written to the slot by the device. The host, which does not know it yet, keeps
    ``-slot - 1`` in its place, and that is what the embedding lookup gets.

    Attributes:
        slots: by request id.
        pools: of the sequences whose hidden states are pooled and not yet complete, by request id.
    """

    def __init__(
        self,
        inputs: StepInputs,
        *,
        max_slots: int,
        max_rows: int,
        block_size: int,
        decode_buckets: Buckets,
        token_buckets: Buckets,
        tiles: Callable[[Int32Array, Int32Array, int], Int32Array],
        widened_starts: Callable[[Int32Array, Int32Array, int], Int32Array],
    ) -> None:
        """
        Args:
            tiles, widened_starts: ``prefill_tiles`` and ``widened_starts`` of ``PagedAttention``.
        """
        super().__init__(max_rows)
        self._inputs = inputs
        self._block_size = block_size
        self._decode_buckets = decode_buckets
        self._token_buckets = token_buckets
        self._tiles = tiles
        self._widened_starts = widened_starts
        self.slots: dict[str, int] = {}
        self.pools: dict[str, PromptPool] = {}
        self._free = list(range(max_slots))
        self._tables = np.zeros((max_slots, inputs.table_stride), np.int32)

    def apply(self, step: SchedulerOutput) -> list[Share]:
        for request_id in step.released:
            self.pools.pop(request_id, None)
            slot = self.slots.pop(request_id, None)
            if slot is not None:
                heapq.heappush(self._free, slot)
        for new in step.new:
            slot = self.slots[new.request_id] = heapq.heappop(self._free)
            self._tables[slot, : len(new.block_ids)] = new.block_ids
        shares = super().apply(step)
        for new in step.new:
            if (pool := self.states[new.request_id].pool) is not None:
                self.pools[new.request_id] = pool
        for scheduled in step.scheduled:
            if scheduled.new_block_ids:
                blocks = self.states[scheduled.request_id].block_ids
                first = len(blocks) - len(scheduled.new_block_ids)
                self._tables[self.slots[scheduled.request_id], first : len(blocks)] = scheduled.new_block_ids
        return shares

    def wants_prompt_rows(self, params: SamplingParams) -> bool:
        return params.prompt_logprobs is not None  # hidden states are pooled without logits

    def take_pools(self, shares: Sequence[Share]) -> dict[str, PromptPool]:
        """Those of the shares that sample, by request id: nothing more is added to them in later steps."""
        if not self.pools:
            return {}
        ids = [share.state.request_id for share in shares if share.samples]
        return {request_id: self.pools.pop(request_id) for request_id in ids if request_id in self.pools}

    def slot(self, state: SequenceState) -> int:
        return self.slots[state.request_id]

    def arrange(self, run: Sequence[Share]) -> ArrangedRun:
        """Writes the inputs of a run, but for the sampler's, to the pinned copy whose turn it is."""
        is_decode = all(share.samples and share.stop - share.start == 1 for share in run) and not any(
            share.num_prompt_rows for share in run
        )
        if is_decode and self.pools:
            is_decode = not any(share.state.request_id in self.pools for share in run)
        # The scheduler lists running sequences first, so this moves little.
        ordered = run if is_decode else sorted(run, key=lambda share: share.stop - share.start > 1)
        slots = np.array([self.slots[share.state.request_id] for share in ordered], np.int32)
        starts = np.array([share.start for share in ordered], np.int32)
        stops = np.array([share.stop for share in ordered], np.int32)
        lengths = stops - starts
        num_sequences, num_tokens = len(ordered), int(lengths.sum())
        num_blocks = int(-(-stops.max() // self._block_size))
        np.take(
            self._tables[:, :num_blocks], slots, axis=0,
            out=self._inputs.block_tables[:num_sequences, :num_blocks], mode="clip",
        )  # fmt: skip
        self._inputs["context_len"][:num_sequences] = stops
        query_start = self._inputs["query_start"]
        query_start[0] = 0
        np.cumsum(lengths, out=query_start[1 : num_sequences + 1])
        if is_decode:
            shape = self._arrange_decode(ordered, slots, starts)
            return ArrangedRun(shape, run, (), slots, stops, (), num_sequences, num_blocks)
        self._arrange_tokens(ordered, slots, starts, num_tokens)
        sampling = [share for share in ordered if share.samples]
        is_sampling = np.array([share.samples for share in ordered])
        rows: list[int] = (query_start[1 : num_sequences + 1][is_sampling] - 1).tolist()
        targets: list[tuple[int, int]] = []
        prompt_shares = [share for share in ordered if share.num_prompt_rows]
        for i, share in enumerate(ordered):
            if share.num_prompt_rows:
                first = int(query_start[i])
                rows.extend(range(first, first + share.num_prompt_rows))
                following = share.state.token_ids.view[share.start + 1 :][: share.num_prompt_rows]
                top_n = share.state.params.prompt_logprobs or 0
                targets += [(token_id, top_n) for token_id in following.tolist()]
        num_rows = self._decode_buckets.choose(len(rows)) if rows else 0
        self._inputs["rows"][: len(rows)] = rows
        self._inputs["rows"][len(rows) : num_rows] = 0
        num_decodes = int((lengths == 1).sum())
        tiles = self._tiles(query_start[: num_sequences + 1], stops, num_decodes)
        self._inputs["tiles"][: tiles.size] = tiles.reshape(-1)
        widened = self._widened_starts(query_start[: num_sequences + 1], stops, num_decodes)
        self._inputs["widened_starts"][: len(widened)] = widened
        pieces = self._arrange_pieces(ordered, query_start) if self.pools else []
        shape = StepShape(
            num_tokens=self._token_buckets.choose(num_tokens),
            num_decodes=num_decodes,
            num_tiles=len(tiles),
            num_rows=num_rows,
            is_decode=False,
            num_pieces=len(pieces),
            num_widened=len(widened),
            most_widened_blocks=-(-int(stops[num_decodes:].max()) // self._block_size) if len(widened) else 0,
        )
        self._pad_tokens(num_tokens, shape.num_tokens)
        return ArrangedRun(
            shape, sampling, prompt_shares, slots[is_sampling], stops[is_sampling], targets,
            num_sequences, num_blocks, pieces,
        )  # fmt: skip

    def _arrange_decode(self, run: Sequence[Share], slots: Int32Array, starts: Int32Array) -> StepShape:
        number = len(run)
        bucket = self._decode_buckets.choose(number)
        inputs = self._inputs
        inputs["token_ids"][:number] = [share.state.token_ids.view[share.start] for share in run]
        inputs["positions"][:number] = starts
        blocks, places = np.divmod(starts, self._block_size)
        inputs["slots"][:number] = self._tables[slots, blocks] * self._block_size + places
        inputs["query_start"][number + 1 : bucket + 1] = number  # padding has no tokens
        inputs["context_len"][number:bucket] = 0
        self._pad_tokens(number, bucket)
        return StepShape(bucket, bucket, 0, bucket, is_decode=True)

    def _arrange_tokens(
        self, run: Sequence[Share], slots: Int32Array, starts: Int32Array, num_tokens: int
    ) -> None:
        inputs, size = self._inputs, self._block_size
        token_ids, positions, cache_slots = inputs["token_ids"], inputs["positions"], inputs["slots"]
        end = 0
        for share, slot in zip(run, slots.tolist(), strict=True):
            first, end = end, end + share.stop - share.start
            token_ids[first:end] = share.state.token_ids.view[share.start : share.stop]
            place = np.arange(share.start, share.stop, dtype=np.int32)
            positions[first:end] = place
            cache_slots[first:end] = self._tables[slot, place // size] * size + place % size

    def _arrange_pieces(self, run: Sequence[Share], query_start: Int32Array) -> list[PooledPiece]:
        """Writes which rows are added up: of a mean those of the prompt, else the one that samples."""
        places: list[tuple[int, int]] = []
        pieces = []
        for i, share in enumerate(run):
            state = share.state
            pool = self.pools.get(state.request_id)
            if pool is None:
                continue
            start, stop = share.start, min(share.stop, state.num_prompt_tokens)
            if state.params.pooling == "last":
                start, stop = share.stop - share.samples, share.stop
            first = int(query_start[i]) - share.start
            for position in range(start, stop, PIECE_ROWS):
                num_rows = min(PIECE_ROWS, stop - position)
                places.append((first + position, num_rows))
                pieces.append(PooledPiece(pool, num_rows))
        self._inputs["pieces"][: 2 * len(places)] = np.array(places, np.int32).reshape(-1)
        return pieces

    def _pad_tokens(self, number: int, bucket: int) -> None:
        padding: list[tuple[str, Any]] = [("token_ids", 0), ("positions", 0), ("slots", -1)]
        for name, value in padding:
            self._inputs[name][number:bucket] = value
