"""From logits to tokens on the CPU.

A row of logits becomes a token in this order, which is vLLM's: forbid stop tokens before ``min_tokens``, or
all tokens that a grammar's mask does not allow, add ``logit_bias``, repetition penalty, frequency and
presence penalties; then either the most likely token, or temperature, min_p, top_k, top_p and a draw. Log-
probabilities are those of the logits as they came.

The random number of a token is a hash of (seed, position), so a sequence gets the same tokens in any batch,
and again after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine_runtime.kernels.cpu_sampling import (
    BLOCK,
    apply_mask,
    apply_penalties,
    draw_rows,
    find_maxima,
    report,
)
from engine_runtime.kernels.numpy_types import Float32Array, Float64Array, Int32Array
from scheduler.messages import SampledToken, SamplingParams, TokenLogprobs

# Below this temperature the most likely token is taken: logits divided by less leave the range of float32.
GREEDY_TEMPERATURE = 1e-5
_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection that mixes all bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2**-53, that depends on the 64-bit seed and the position only.

    It is output number ``position`` of a SplitMix64 generator whose state is a hash of the seed.
    """
    state = _mix((seed & _MASK) ^ 0x5851F42D4C957F2D)
    return float(_mix((state + (position + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler needs to know about the sequence of one row of logits.

    Attributes:
        token_ids: int32, prompt and generated tokens so far. The token to sample has the position
        ``len(token_ids)``. num_prompt_tokens: how many of ``token_ids`` are the prompt.
        mask: int32 [at least vocabulary / 32] of a grammar, least significant bit first; a set bit allows a
        token. It says by itself which stop tokens may come.
    """

    request_id: str
    params: SamplingParams
    token_ids: Int32Array
    num_prompt_tokens: int
    mask: Int32Array | None = None


class Sampler:
    """Samples one token a row, on the calling thread. Holds scratch memory: use one object a thread.

    Args:
        vocab_size: columns of the logits.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        padded = -(-vocab_size // BLOCK) * BLOCK
        self._scratch: tuple[Float32Array, Float64Array, Float32Array, Int32Array] = (
            np.empty(padded, np.float32),  # weights
            np.empty(padded // BLOCK, np.float64),  # their sums, a block each
            np.empty(padded, np.float32),  # a few of the weights
            np.empty(padded, np.int32),  # and their token ids
        )
        self._counts: Int32Array = np.zeros(vocab_size, np.int32)
        self._is_seen: Int32Array = np.zeros(vocab_size, np.int32)
        self._compile()

    def sample(self, logits: Float32Array, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Chooses the next token of each row.

        Args:
            logits: float32 [len(rows), vocab_size], contiguous and writable; overwritten.
            rows: one record for each row.

        Returns:
            One record a row, in order. ``is_valid`` is False where the logits, as they came or after bias
            and penalties, hold NaN or +inf or nothing finite; other rows are not affected.

        Raises:
            ValueError: logits of another shape, dtype or layout.
        """
        self._check(logits, len(rows))
        maxima, tokens, is_valid = _find_maxima(logits)
        raw: dict[int, tuple[Float32Array, np.float32]] = {}
        for i, row in enumerate(rows):
            if is_valid[i] and _changes_logits(row):
                if row.params.logprobs is not None:
                    raw[i] = logits[i : i + 1].copy(), maxima[i]
                self._change_logits(logits, i, row)
                find_maxima(logits, i, i + 1, maxima, tokens, is_valid)
        drawn = [
            i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_TEMPERATURE and is_valid[i]
        ]
        if drawn:
            self._draw(logits, maxima, rows, drawn, tokens)
        sampled = []
        for i, (row, token, valid) in enumerate(zip(rows, tokens.tolist(), is_valid.tolist(), strict=True)):
            logprobs = None
            if row.params.logprobs is not None and valid:
                source, largest = raw.get(i, (logits[i : i + 1], maxima[i]))
                logprobs = self._report(source, 0, largest, token, row.params.logprobs)
            sampled.append(SampledToken(row.request_id, token, logprobs, bool(valid)))
        return sampled

    def prompt_logprobs(
        self, logits: Float32Array, target_ids: npt.ArrayLike, top_n: int
    ) -> tuple[TokenLogprobs, ...]:
        """How likely the model found given tokens.

        Args:
            logits: float32 [num_tokens, vocab_size], contiguous and writable, but not written.
            target_ids: [num_tokens], the token that followed each row.
            top_n: number of most likely tokens reported with each; 0 for none.

        Returns:
            One record a row. Where the logits hold NaN, +inf or nothing finite, the logprob is -inf and
            ``top`` empty.

        Raises:
            ValueError: logits of another shape, dtype or layout.
        """
        targets: list[int] = np.asarray(target_ids, np.int64).tolist()
        self._check(logits, len(targets))
        maxima, _, is_valid = _find_maxima(logits)
        return tuple(
            self._report(logits, i, maxima[i], target, top_n)
            if is_valid[i]
            else TokenLogprobs(target, -np.inf, self.vocab_size)
            for i, target in enumerate(targets)
        )

    def _compile(self) -> None:
        """Uses every kernel once, so that no request waits for the compiler."""
        params = SamplingParams(top_p=0.5, repetition_penalty=2.0, logprobs=1)
        mask = np.full(-(-self.vocab_size // 32), -1, np.int32)
        mask.flags.writeable = False  # as those of a step
        row = SamplingRow("", params, np.zeros(1, np.int32), 1, mask)
        self.sample(np.zeros((1, self.vocab_size), np.float32), [row])

    def _draw(
        self,
        logits: Float32Array,
        maxima: Float32Array,
        rows: Sequence[SamplingRow],
        drawn: list[int],
        tokens: Int32Array,
    ) -> None:
        """Replaces the tokens of the rows ``drawn``."""
        params = [rows[i].params for i in drawn]
        draw_rows(
            logits,
            maxima,
            np.array(drawn, np.int32),
            np.array([1.0 / p.temperature for p in params]),
            np.array([p.top_k for p in params], np.int32),
            np.array([p.top_p for p in params]),
            np.array([p.min_p for p in params]),
            np.array([uniform(rows[i].params.seed, len(rows[i].token_ids)) for i in drawn]),
            *self._scratch,
            tokens,
        )

    def _check(self, logits: Float32Array, num_rows: int) -> None:
        if logits.shape != (num_rows, self.vocab_size) or logits.dtype != np.float32:
            raise ValueError(
                f"logits must be float32 [{num_rows}, {self.vocab_size}], not {logits.dtype} {logits.shape}"
            )
        if not logits.flags.c_contiguous or not logits.flags.writeable:
            raise ValueError("logits must be contiguous and writable")

    def _change_logits(self, logits: Float32Array, i: int, row: SamplingRow) -> None:
        params = row.params
        if row.mask is not None:
            apply_mask(logits, i, row.mask)
        elif _forbids_stop(row):
            stop = np.array(params.stop_token_ids, np.int64)
            logits[i, stop[(stop >= 0) & (stop < self.vocab_size)]] = -np.inf
        for token_id, bias in params.logit_bias:
            if 0 <= token_id < self.vocab_size:
                logits[i, token_id] += bias
        if _penalizes(params):
            apply_penalties(
                logits, i, row.token_ids, row.num_prompt_tokens,
                params.presence_penalty, params.frequency_penalty, params.repetition_penalty,
                self._counts, self._is_seen,
            )  # fmt: skip

    def _report(
        self, logits: Float32Array, i: int, largest: np.float32, token_id: int, top_n: int
    ) -> TokenLogprobs:
        top_n = min(top_n, self.vocab_size)
        top_ids = np.empty(top_n, np.int32)
        top_logprobs = np.empty(top_n, np.float64)
        logprob, rank = report(logits, i, largest, token_id, top_n, *self._scratch, top_ids, top_logprobs)
        top = tuple(zip(top_ids.tolist(), top_logprobs.tolist(), strict=True))
        return TokenLogprobs(token_id, logprob, rank, top)


def _find_maxima(logits: Float32Array) -> tuple[Float32Array, Int32Array, Int32Array]:
    """Of each row: the largest logit, where it is, whether the row is valid."""
    count = len(logits)
    maxima, tokens, is_valid = np.empty(count, np.float32), *np.empty((2, count), np.int32)
    find_maxima(logits, 0, count, maxima, tokens, is_valid)
    return maxima, tokens, is_valid


def _forbids_stop(row: SamplingRow) -> bool:
    return len(row.token_ids) - row.num_prompt_tokens < row.params.min_tokens and bool(
        row.params.stop_token_ids
    )


def _penalizes(params: SamplingParams) -> bool:
    return (
        params.presence_penalty != 0.0 or params.frequency_penalty != 0.0 or params.repetition_penalty != 1.0
    )


def _changes_logits(row: SamplingRow) -> bool:
    return row.mask is not None or bool(row.params.logit_bias) or _penalizes(row.params) or _forbids_stop(row)
