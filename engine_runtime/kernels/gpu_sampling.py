"""The sampler on a GPU, from the host's side: its memory, its launches and its results.

What it computes is what ``engine_runtime/sampling.py`` computes; ``triton/sampling.py`` says how.

    admit(stream, slot, ...)              once a sequence: uploads what only it needs
    pack(view, slots, positions)          a step's parameters into pinned memory   -> PackedRows
    (the executor copies the view to the device)
    enqueue(stream, path, ...)            launches; can be captured in a CUDA graph
    (the executor copies ``output_bytes(path)`` bytes from ``output_address`` back)
    collect(view, packed, request_ids)    -> SampledToken
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine_runtime.cuda import DeviceBuffer, Event, PinnedBuffer, Stream
from engine_runtime.kernels import sampling_layout as layout
from engine_runtime.kernels.kernel_library import KernelLibrary
from engine_runtime.kernels.sampling_rows import (
    ChangedLogits,
    PackedRows,
    SamplingPath,
    SamplingRows,
    changed_logits,
    has_penalties,
    token_counts,
)
from scheduler.messages import SampledToken, SamplingParams, TokenLogprobs, TokenMasks

_KIND = {SamplingPath.GREEDY: "greedy", SamplingPath.DRAWN: "drawn", SamplingPath.FULL: "full"}
_SLAB_SLOTS = 16
_STAGING_BUFFERS = 8
_MASK_STAGING_BUFFERS = 2  # one a step in flight


class GpuSampler:
    """Samples the rows of a step on the device. All calls are made by the thread that owns the device.

    Attributes:
        input_bytes: of a step's parameters, a multiple of 16.
        sampled_tokens_address: int32 [max_slots] on the device, the last token of each slot, for ``embed``.
        output_address: where the results of a step lie on the device.
    """

    def __init__(self, kernels: KernelLibrary, vocab_size: int, max_rows: int, max_slots: int) -> None:
        """
        Args:
            max_rows: rows of logits in one step at most, those of prompt tokens included.
            max_slots: sequences known at a time.

        Raises:
            ValueError: the vocabulary is larger than ``layout.MAX_VOCAB_SIZE``.
            KernelsMissingError: the kernels were not compiled.
            CudaError: not enough memory.
        """
        if not 0 < vocab_size <= layout.MAX_VOCAB_SIZE:
            raise ValueError(f"a vocabulary of {vocab_size}; the sampler takes up to {layout.MAX_VOCAB_SIZE}")
        self.vocab_size = vocab_size
        self.max_rows = -(-max_rows // 16) * 16
        self.max_slots = max_slots
        self.input_bytes = self.max_rows * layout.BYTES_PER_ROW
        self._rows = SamplingRows(vocab_size, max_slots)
        divisible = "" if vocab_size % 16 == 0 else "_any"
        self._scans = [kernels.get(f"sample_scan_{_KIND[path]}{divisible}") for path in SamplingPath]
        self._draws = [kernels.get(f"sample_draw_{_KIND[path]}") for path in SamplingPath]
        drawing = (SamplingPath.DRAWN, SamplingPath.FULL)
        self._wide = {path: kernels.get(f"sample_wide_{_KIND[path]}{divisible}") for path in drawing}
        self._report = kernels.get("sample_report")
        self._memory = DeviceBuffer(self.device_bytes(self.max_rows, max_slots))
        self._memory.fill(0)
        self._addresses = _lay_out(self._memory.address, self.max_rows, max_slots)
        self.sampled_tokens_address = self._addresses["sampled_tokens"]
        self.output_address = self._addresses["tokens"]
        self._counts = _SlotMemory(2 * vocab_size, max_slots)
        self._changes = _SlotMemory(2 * layout.CHANGES_BYTES, max_slots)
        self._staging = _Staging(max(2 * vocab_size, 2 * layout.CHANGES_BYTES))
        self._mask_bytes = _aligned(_most_mask_bytes(vocab_size, max_slots))
        self._masks: DeviceBuffer | None = None
        self._mask_staging = _Staging(self._mask_bytes, _MASK_STAGING_BUFFERS)

    @staticmethod
    def device_bytes(max_rows: int, max_slots: int) -> int:
        """Device memory taken at once: 89 KiB a row."""
        max_rows = -(-max_rows // 16) * 16
        return _lay_out(0, max_rows, max_slots)["end"]

    @staticmethod
    def most_bytes_later(vocab_size: int, max_slots: int) -> int:
        """Device memory that is taken later, 16 slots at a time, if such sequences come.

        Two bytes a token of the vocabulary for each slot with penalties, 24 KiB for each with biases or
        min_tokens, and with the first grammar a bit a token for all.
        """
        slots = -(-max_slots // _SLAB_SLOTS) * _SLAB_SLOTS
        later = slots * (_aligned(2 * vocab_size) + _aligned(2 * layout.CHANGES_BYTES))
        return later + _aligned(_most_mask_bytes(vocab_size, max_slots))

    def admit(
        self,
        stream: Stream,
        slot: int,
        params: SamplingParams,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
    ) -> None:
        """Makes the slot that of a new sequence; also of one that comes back after a preemption.

        Args:
            stream: the uploads are enqueued there, before the sequence's first step.
            token_ids: prompt and generated tokens so far.

        Raises:
            ValueError: more changed logits or log-probabilities than the kernels take.
            CudaError: no memory for the first sequence with penalties or biases (``is_fatal`` is False).
        """
        lists = [changed_logits(params, self.vocab_size, forbids_stop=forbids) for forbids in (False, True)]
        counts_address = changes_address = 0
        if has_penalties(params):
            counts_address = self._counts.address(slot)
            counts = token_counts(token_ids, num_prompt_tokens, self.vocab_size)
            self._staging.upload(stream, counts_address, counts.view(np.uint8))
        if len(lists[0].token_ids) or (params.min_tokens > 0 and len(lists[1].token_ids)):
            changes_address = self._changes.address(slot)
            self._staging.upload(stream, changes_address, _pack_lists(lists))
        self._rows.set(
            slot,
            params,
            num_prompt_tokens,
            counts_address=counts_address,
            changes_address=changes_address,
            num_changes=(len(lists[0].token_ids), len(lists[1].token_ids)),
        )

    def upload_masks(self, stream: Stream, masks: TokenMasks) -> dict[str, int]:
        """Enqueues the copy of a step's masks; the device address of each, by request id.

        Raises:
            CudaError: no memory for the first masks (``is_fatal`` is False).
        """
        if self._masks is None:
            self._masks = DeviceBuffer(self._mask_bytes)
        stride = 4 * _mask_words(self.vocab_size)
        rows = np.frombuffer(masks.bits, np.uint8).reshape(len(masks.request_ids), -1)[:, :stride]
        self._mask_staging.upload(stream, self._masks.address, np.ascontiguousarray(rows).reshape(-1))
        first = self._masks.address
        return {request_id: first + row * stride for row, request_id in enumerate(masks.request_ids)}

    def pack(
        self,
        view: npt.NDArray[np.uint8],
        slots: npt.ArrayLike,
        positions: npt.ArrayLike,
        *,
        grammars: npt.ArrayLike | None = None,
        targets: Sequence[tuple[int, int]] = (),
        num_rows: int | None = None,
    ) -> PackedRows:
        """Writes a step's parameters to ``input_bytes`` bytes of pinned memory, see ``SamplingRows.pack``."""
        return self._rows.pack(
            view, self.max_rows, slots, positions, grammars=grammars, targets=targets, num_rows=num_rows
        )

    def enqueue(
        self, stream: Stream, path: SamplingPath, num_rows: int, logits_address: int, input_address: int
    ) -> None:
        """Launches the kernels of a step. Everything but the contents of memory is in the arguments.

        Args:
            path: at least that of the packed rows.
            num_rows: rows of the bucket, all of them packed.
            logits_address: float32 [num_rows, vocab_size], 16-byte aligned. Not changed when all is done.
            input_address: where the packed rows were copied to, 16-byte aligned.
        """
        at = self._addresses
        numbers = input_address
        addresses = numbers + 8 * layout.NUM_NUMBERS * self.max_rows
        words = addresses + 8 * layout.NUM_ADDRESSES * self.max_rows
        vocab_size = self.vocab_size
        num_tiles = -(-vocab_size // (layout.SUBTILE * layout.TILE_SUBTILES))
        self._scans[path].launch(
            (num_tiles, num_rows, 1), stream,
            logits_address, words, addresses, at["maxima"], at["sums"], at["raw_maxima"], at["raw_sums"],
            vocab_size,
        )  # fmt: skip
        self._draws[path].launch(
            (num_rows, 1, 1), stream,
            logits_address, words, numbers, addresses, at["maxima"], at["sums"], at["subtiles"],
            at["few_weights"], at["few_ids"], at["tokens"], at["is_valid"], at["is_wide"],
            at["sampled_tokens"], vocab_size,
        )  # fmt: skip
        if path in self._wide:
            self._wide[path].launch(
                (num_rows, 1, 1), stream,
                logits_address, words, numbers, addresses, at["maxima"], at["sums"],
                at["wide_weights"], at["tokens"], at["is_valid"], at["is_wide"], at["sampled_tokens"],
                vocab_size,
            )  # fmt: skip
        if path is SamplingPath.FULL:
            self._report.launch(
                (num_rows, 1, 1), stream,
                logits_address, words, at["raw_maxima"], at["raw_sums"], at["subtiles"], at["tokens"],
                at["is_valid"], at["ranks"], at["chosen_logits"], at["largest_logits"], at["totals"],
                at["top_ids"], at["top_logits"], vocab_size,
            )  # fmt: skip

    def output_bytes(self, path: SamplingPath) -> int:
        """How many bytes from ``output_address`` a step's results are."""
        last = "end_of_output" if path is SamplingPath.FULL else "ranks"
        return self._addresses[last] - self.output_address

    def collect(
        self, view: npt.NDArray[np.uint8], packed: PackedRows, request_ids: Sequence[str]
    ) -> tuple[list[SampledToken], list[TokenLogprobs]]:
        """Reads a step's results.

        Args:
            view: the copy of ``output_bytes(path)`` bytes, complete.
            request_ids: of the rows that sample, in order.

        Returns:
            The sampled tokens, and the log-probabilities of the given ``targets``: those of a row that is not
            finite are -inf, as on the CPU.
        """
        number = packed.num_sampled
        tokens = self._field(view, "tokens", np.int32)[: packed.num_rows].tolist()
        is_valid = self._field(view, "is_valid", np.int32)[: packed.num_rows].tolist()
        if packed.top_ns is None:
            return [
                SampledToken(request_id, token, None, bool(valid))
                for request_id, token, valid in zip(request_ids, tokens, is_valid, strict=False)
            ], []
        logprobs = self._logprobs(view, packed.top_ns, tokens, is_valid)
        sampled = [
            SampledToken(request_id, token, logprob if valid else None, bool(valid))
            for request_id, token, valid, logprob in zip(
                request_ids, tokens, is_valid, logprobs, strict=False
            )
        ]
        targets = [logprob for logprob in logprobs[number : len(packed.top_ns)] if logprob is not None]
        return sampled, targets

    def close(self) -> None:
        """Frees all memory; nothing may be running."""
        self._memory.free()
        self._counts.close()
        self._changes.close()
        self._staging.close()
        self._mask_staging.close()
        if self._masks is not None:
            self._masks.free()

    def _logprobs(
        self,
        view: npt.NDArray[np.uint8],
        top_ns: Sequence[int | None],
        tokens: list[int],
        is_valid: list[int],
    ) -> list[TokenLogprobs | None]:
        number = len(top_ns)
        most = max(top_n or 0 for top_n in top_ns)
        ranks: list[int] = self._field(view, "ranks", np.int32)[:number].tolist()
        totals = self._field(view, "totals", np.float32)[:number].astype(np.float64)
        # Rows without log-probabilities hold anything.
        with np.errstate(all="ignore"):
            offsets = np.log(totals) + self._field(view, "largest_logits", np.float32)[:number]
            chosen = (self._field(view, "chosen_logits", np.float32)[:number] - offsets).tolist()
            top_logits = self._field(view, "top_logits", np.float32).reshape(-1, layout.MAX_TOP)
            values = (top_logits[:number, :most] - offsets[:, None]).tolist()
        top_ids = self._field(view, "top_ids", np.int32).reshape(-1, layout.MAX_TOP)[:number, :most].tolist()
        result: list[TokenLogprobs | None] = []
        for row, top_n in enumerate(top_ns):
            if top_n is None:
                result.append(None)
            elif not is_valid[row]:
                result.append(TokenLogprobs(tokens[row], -math.inf, self.vocab_size))
            else:
                top = tuple(zip(top_ids[row][:top_n], values[row][:top_n], strict=True))
                result.append(TokenLogprobs(tokens[row], chosen[row], ranks[row], top))
        return result

    def _field(self, view: npt.NDArray[np.uint8], name: str, dtype: type[Any]) -> npt.NDArray[Any]:
        """[max_rows], or [max_rows * MAX_TOP], of a result."""
        start = self._addresses[name] - self.output_address
        count = self.max_rows * (layout.MAX_TOP if name.startswith("top_") else 1)
        return view[start : start + 4 * count].view(dtype)


def _mask_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def _most_mask_bytes(vocab_size: int, max_slots: int) -> int:
    return 4 * _mask_words(vocab_size) * max_slots


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 256) * 256


def _lay_out(start: int, max_rows: int, max_slots: int) -> dict[str, int]:
    """Where each array lies; ``tokens`` to ``end_of_output`` are the results."""
    words_per_row = {
        "tokens": 1,
        "is_valid": 1,
        "ranks": 1,
        "chosen_logits": 1,
        "largest_logits": 1,
        "totals": 1,
        "top_ids": layout.MAX_TOP,
        "top_logits": layout.MAX_TOP,
        "end_of_output": 0,
        "is_wide": 1,
        "maxima": layout.MAX_SUBTILES,
        "sums": layout.MAX_SUBTILES,
        "raw_maxima": layout.MAX_SUBTILES,
        "raw_sums": layout.MAX_SUBTILES,
        "subtiles": layout.MAX_SUBTILES,
        "few_weights": layout.FEW,
        "wide_weights": layout.WIDE_FEW,
        "few_ids": layout.FEW,
    }
    addresses = {}
    for name, count in words_per_row.items():
        addresses[name] = start
        start += 4 * count * max_rows
    addresses["sampled_tokens"] = start
    addresses["end"] = start + 4 * max_slots
    return addresses


def _pack_lists(lists: Sequence[ChangedLogits]) -> npt.NDArray[np.uint8]:
    """Two lists of changes as the kernels read them."""
    packed = np.zeros((len(lists), 3, layout.MAX_CHANGES), np.int32)
    for area, changes in zip(packed, lists, strict=True):
        area[0, : len(changes.token_ids)] = changes.token_ids
        area[1, : len(changes.values)] = changes.values.view(np.int32)
    return packed.reshape(-1).view(np.uint8)


class _SlotMemory:
    """Some bytes for each slot, allocated for 16 slots at a time when the first of them needs it."""

    def __init__(self, num_bytes: int, max_slots: int) -> None:
        self._stride = _aligned(num_bytes)
        self._slabs: list[DeviceBuffer | None] = [None] * -(-max_slots // _SLAB_SLOTS)

    def address(self, slot: int) -> int:
        number, place = divmod(slot, _SLAB_SLOTS)
        slab = self._slabs[number]
        if slab is None:
            slab = self._slabs[number] = DeviceBuffer(_SLAB_SLOTS * self._stride)
        return slab.address + place * self._stride

    def close(self) -> None:
        for slab in self._slabs:
            if slab is not None:
                slab.free()


class _Staging:
    """Pinned memory that uploads pass through, some of them under way at a time."""

    def __init__(self, num_bytes: int, num_buffers: int = _STAGING_BUFFERS) -> None:
        self._num_bytes = num_bytes
        self._num_buffers = num_buffers
        self._buffers: list[tuple[PinnedBuffer, Event]] = []
        self._next = 0

    def upload(self, stream: Stream, destination: int, data: npt.NDArray[np.uint8]) -> None:
        """Enqueues a copy; waits if the device has not taken the last one out of the same buffer."""
        if len(self._buffers) < self._num_buffers:
            self._buffers.append((PinnedBuffer(self._num_bytes), Event()))
            self._next = len(self._buffers) - 1
        buffer, event = self._buffers[self._next]
        self._next = (self._next + 1) % self._num_buffers
        event.synchronize()
        buffer.array[: len(data)] = data
        stream.copy_to_device(destination, buffer.address, len(data))
        event.record(stream)

    def close(self) -> None:
        for buffer, event in self._buffers:
            buffer.free()
            event.close()
