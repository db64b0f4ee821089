"""What the GPU sampler's kernels are told about each row of logits, packed by numpy.

What does not change while a sequence runs is computed once and kept for its slot; a step only gathers the
records of its slots and hashes the positions. ``sampling_layout.py`` says how the result lies in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from engine_runtime.kernels import sampling_layout as layout
from engine_runtime.kernels.numpy_types import Float64Array, Int32Array
from scheduler.messages import SamplingParams

# As in engine_runtime/sampling.py, which this module does not import since it compiles kernels for the CPU.
GREEDY_TEMPERATURE = 1e-5
_LOG2_E = np.float32(1.4426950408889634)
_SMALLEST = np.float32(2.0**-126)
_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class SamplingPath(IntEnum):
    """Which kernels a step needs: each includes what the one before it can do."""

    GREEDY = 0
    """Every row takes the most likely token."""
    DRAWN = 1
    """Temperature, top_k, top_p, min_p."""
    FULL = 2
    """Penalties, biases, forbidden tokens, grammars, log-probabilities, given tokens."""


@dataclass(frozen=True, slots=True)
class PackedRows:
    """What ``SamplingRows.pack`` wrote.

    Attributes:
        num_sampled: rows whose token is chosen; they come first.
        top_ns: for every row the number of most likely tokens to report, None where no log-probability is
            wanted; None if that is so for all.
    """

    path: SamplingPath
    num_sampled: int
    num_rows: int
    top_ns: tuple[int | None, ...] | None


@dataclass(frozen=True, slots=True)
class ChangedLogits:
    """Values that are added to the logits of a few tokens.

    Attributes:
        token_ids: int32 [n], ascending, each once.
        values: float32 [n]; -inf forbids.
    """

    token_ids: Int32Array
    values: npt.NDArray[np.float32]


def changed_logits(params: SamplingParams, vocab_size: int, *, forbids_stop: bool) -> ChangedLogits:
    """The biases of a sequence and, with ``forbids_stop``, its stop tokens. Unknown ids are left out.

    Raises:
        ValueError: more than ``layout.MAX_CHANGES`` tokens.
    """
    values: dict[int, np.float32] = {}
    for token_id, bias in params.logit_bias:
        values[token_id] = values.get(token_id, np.float32(0.0)) + np.float32(bias)
    if forbids_stop:
        values |= dict.fromkeys(params.stop_token_ids, np.float32(-np.inf))
    token_ids = sorted(token_id for token_id in values if 0 <= token_id < vocab_size)
    if len(token_ids) > layout.MAX_CHANGES:
        raise ValueError(
            f"biases and stop tokens name {len(token_ids)} tokens, more than {layout.MAX_CHANGES}"
        )
    return ChangedLogits(
        np.array(token_ids, np.int32), np.array([values[token_id] for token_id in token_ids], np.float32)
    )


def has_penalties(params: SamplingParams) -> bool:
    """Whether the tokens so far change the logits."""
    return (
        params.presence_penalty != 0.0 or params.frequency_penalty != 0.0 or params.repetition_penalty != 1.0
    )


def token_counts(token_ids: Sequence[int], num_prompt_tokens: int, vocab_size: int) -> npt.NDArray[np.uint16]:
    """uint16 [vocab_size]: how often each was generated, at most 32767, plus 32768 if it is in the prompt."""
    ids = np.asarray(token_ids, np.int64)
    is_known = (ids >= 0) & (ids < vocab_size)
    prompt, generated = ids[:num_prompt_tokens], ids[num_prompt_tokens:]
    counts = np.bincount(generated[is_known[num_prompt_tokens:]], minlength=vocab_size)
    result = np.minimum(counts, layout.COUNT_BITS).astype(np.uint16)
    result[prompt[is_known[:num_prompt_tokens]]] |= np.uint16(layout.PROMPT_BIT)
    return result


def uniforms(states: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> Float64Array:
    """``engine_runtime.sampling.uniform`` for arrays; ``states`` are those of ``random_state``."""
    hashes = _mix(states + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_state(seed: int) -> np.uint64:
    """The state of the generator of a seed."""
    state = np.array([(seed & _MASK) ^ 0x5851F42D4C957F2D], np.uint64)
    return np.uint64(_mix(state)[0])


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64, see ``engine_runtime/sampling.py``."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def split(
    memory: npt.NDArray[np.uint8], max_rows: int
) -> tuple[Float64Array, npt.NDArray[np.int64], Int32Array]:
    """Views of ``numbers``, ``addresses`` and ``words``, in this order in memory, for ``max_rows`` rows."""
    first = 8 * layout.NUM_NUMBERS * max_rows
    second = first + 8 * layout.NUM_ADDRESSES * max_rows
    end = layout.BYTES_PER_ROW * max_rows
    return (
        memory[:first].view(np.float64).reshape(max_rows, layout.NUM_NUMBERS),
        memory[first:second].view(np.int64).reshape(max_rows, layout.NUM_ADDRESSES),
        memory[second:end].view(np.int32).reshape(max_rows, layout.NUM_WORDS),
    )


class SamplingRows:
    """The records of all slots.

    Args:
        vocab_size: at most ``layout.MAX_VOCAB_SIZE``.
        max_slots: sequences that the executor knows at a time.
    """

    def __init__(self, vocab_size: int, max_slots: int) -> None:
        self.vocab_size = vocab_size
        self._numbers = np.zeros((max_slots, layout.NUM_NUMBERS))
        self._addresses = np.zeros((max_slots, layout.NUM_ADDRESSES), np.int64)
        self._words = np.zeros((max_slots, layout.NUM_WORDS), np.int32)
        self._states = np.zeros(max_slots, np.uint64)
        self._top_ns = np.full(max_slots, -1, np.int32)
        # Below this position the second list of changes holds.
        self._forbids_until = np.zeros(max_slots, np.int64)
        self._num_forbidding = np.zeros(max_slots, np.int32)

    def set(
        self,
        slot: int,
        params: SamplingParams,
        num_prompt_tokens: int,
        *,
        counts_address: int = 0,
        changes_address: int = 0,
        num_changes: tuple[int, int] = (0, 0),
    ) -> None:
        """Describes the sequence that has the slot from now on.

        Args:
            counts_address: device memory with ``token_counts``, if the sequence has penalties.
            changes_address: device memory with two lists of changes, without and with the stop tokens.
            num_changes: the length of each.

        Raises:
            ValueError: more log-probabilities than ``layout.MAX_TOP`` are wanted.
        """
        if params.logprobs is not None and params.logprobs > layout.MAX_TOP:
            raise ValueError(f"{params.logprobs} log-probabilities a token, more than {layout.MAX_TOP}")
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else 0
        flags = 0
        factor = np.float32(0.0)
        if params.temperature >= GREEDY_TEMPERATURE:
            flags |= layout.DRAWS
            factor = np.float32(1.0 / params.temperature) * _LOG2_E
            if top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0:
                flags |= layout.FILTERS
        if num_changes[0]:
            flags |= layout.HAS_CHANGES
        if counts_address:
            flags |= layout.HAS_PENALTIES
        if params.logprobs is not None:
            flags |= layout.HAS_LOGPROBS
        words = self._words[slot]
        floats = words.view(np.float32)
        words[layout.FLAGS] = flags
        words[layout.SLOT] = slot
        floats[layout.FACTOR] = factor
        words[layout.TOP_K] = top_k
        floats[layout.MIN_WEIGHT] = max(np.float32(params.min_p), _SMALLEST)
        words[layout.TOP_N] = min(params.logprobs or 0, self.vocab_size)
        words[layout.TARGET] = -1
        words[layout.NUM_CHANGES] = num_changes[0]
        floats[layout.REPETITION] = params.repetition_penalty
        floats[layout.FREQUENCY] = params.frequency_penalty
        floats[layout.PRESENCE] = params.presence_penalty
        self._numbers[slot, layout.TOP_P] = params.top_p
        self._addresses[slot] = 0
        self._addresses[slot, layout.COUNTS] = counts_address
        self._addresses[slot, layout.CHANGES] = changes_address
        self._states[slot] = random_state(params.seed)
        self._top_ns[slot] = -1 if params.logprobs is None else words[layout.TOP_N]
        has_more = num_changes[1] > 0 and params.min_tokens > 0
        self._forbids_until[slot] = num_prompt_tokens + params.min_tokens if has_more else 0
        self._num_forbidding[slot] = num_changes[1]

    def pack(
        self,
        memory: npt.NDArray[np.uint8],
        max_rows: int,
        slots: npt.ArrayLike,
        positions: npt.ArrayLike,
        *,
        grammars: npt.ArrayLike | None = None,
        targets: Sequence[tuple[int, int]] = (),
        num_rows: int | None = None,
    ) -> PackedRows:
        """Writes the rows of a step.

        Args:
            memory: uint8 [max_rows * layout.BYTES_PER_ROW], 8-byte aligned.
            slots: [n], of the sequences that sample, in the order of the rows of logits.
            positions: [n], how many tokens precede each sampled one.
            grammars: [n], device addresses of bitmasks int32 [ceil(V / 32)], least significant bit first, a
                set bit allows the token; 0 for none.
            targets: (token id, top_n) of further rows, whose token is given (log-probabilities of prompts).
            num_rows: rows of the bucket; those that are left over are computed and forgotten.

        Raises:
            ValueError: the rows do not fit.
        """
        slots = np.asarray(slots, np.int64)
        positions = np.asarray(positions, np.int64)
        number = len(slots)
        used = number + len(targets)
        total = used if num_rows is None else num_rows
        if not used <= total <= max_rows:
            raise ValueError(f"{used} rows in a step of {total} rows, at most {max_rows}")
        all_numbers, all_addresses, all_words = split(memory, max_rows)
        numbers, addresses, words = all_numbers[:number], all_addresses[:number], all_words[:number]
        np.take(self._numbers, slots, axis=0, out=numbers, mode="clip")
        np.take(self._addresses, slots, axis=0, out=addresses, mode="clip")
        np.take(self._words, slots, axis=0, out=words, mode="clip")
        numbers[:, layout.UNIFORM] = uniforms(self._states[slots], positions)
        is_early = positions < self._forbids_until[slots]
        if grammars is not None:  # they say by themselves which stop tokens may come
            is_early &= np.asarray(grammars, np.int64) == 0
        forbids = np.flatnonzero(is_early)
        if len(forbids):
            words[forbids, layout.NUM_CHANGES] = self._num_forbidding[slots[forbids]]
            words[forbids, layout.FLAGS] |= layout.HAS_CHANGES
            addresses[forbids, layout.CHANGES] += layout.CHANGES_BYTES
        if grammars is not None:
            addresses[:, layout.GRAMMAR] = grammars
            words[:, layout.FLAGS] |= np.where(
                addresses[:, layout.GRAMMAR] != 0, layout.HAS_GRAMMAR, 0
            ).astype(np.int32)
        if total > number:
            self._pack_rest(all_words[number:total], targets)
        combined = int(np.bitwise_or.reduce(all_words[:total, layout.FLAGS], initial=0))
        top_ns: tuple[int | None, ...] | None = None
        if combined & layout.HAS_LOGPROBS:
            wanted: list[Any] = self._top_ns[slots].tolist()
            top_ns = tuple([None if n < 0 else n for n in wanted] + [top_n for _, top_n in targets])
        if combined & ~(layout.DRAWS | layout.FILTERS):
            path = SamplingPath.FULL
        elif combined:
            path = SamplingPath.DRAWN
        else:
            path = SamplingPath.GREEDY
        return PackedRows(path, number, total, top_ns)

    def _pack_rest(self, words: Int32Array, targets: Sequence[tuple[int, int]]) -> None:
        words[:] = 0
        words[:, layout.SLOT] = -1
        words[:, layout.TARGET] = -1
        for row, (token_id, top_n) in zip(words, targets, strict=False):
            row[layout.FLAGS] = layout.HAS_LOGPROBS
            row[layout.TARGET] = token_id
            row[layout.TOP_N] = min(top_n, layout.MAX_TOP, self.vocab_size)
