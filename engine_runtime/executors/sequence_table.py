"""The sequences that an executor knows, and their shares of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine_runtime.executors.sequence_state import SequenceState
from engine_runtime.kernels.numpy_types import Int32Array
from scheduler.messages import SamplingParams, SchedulerOutput, TokenMasks


@dataclass(frozen=True, slots=True)
class Share:
    """Tokens [start, stop) of a sequence, in one run.

    Attributes:
        num_prompt_rows: so many first tokens of the share want a row though nothing is sampled from it: for
            the logprob of the prompt token after them, or to be pooled.
        samples: whether the last token wants its logits to sample from.
    """

    state: SequenceState
    start: int
    stop: int
    num_prompt_rows: int
    samples: bool

    @property
    def num_rows(self) -> int:
        """Rows of logits."""
        return self.num_prompt_rows + self.samples


def mask_rows(masks: TokenMasks | None) -> dict[str, Int32Array]:
    """int32 [words] for each sequence that has a mask; read-only."""
    if masks is None:
        return {}
    rows = np.frombuffer(masks.bits, np.int32).reshape(len(masks.request_ids), -1)
    return dict(zip(masks.request_ids, rows, strict=True))


class SequenceTable:
    """Follows the scheduler: who is new, who is gone, whose turn it is."""

    def __init__(self, max_rows: int) -> None:
        """
        Args:
            max_rows: rows of logits of one run; at least the sequences of a step.
        """
        self.states: dict[str, SequenceState] = {}
        self._max_rows = max_rows

    def apply(self, step: SchedulerOutput) -> list[Share]:
        """Forgets what is released, learns what is new, and says what each sequence computes.

        Raises:
            KeyError: a sequence is scheduled that is not known.
        """
        for request_id in step.released:
            self.states.pop(request_id, None)
        for new in step.new:
            self.states[new.request_id] = SequenceState(new)
        for request_id, token_ids in step.forced:
            self.states[request_id].token_ids.extend(token_ids)
        shares = []
        for scheduled in step.scheduled:
            state = self.states[scheduled.request_id]
            if scheduled.new_block_ids:
                state.block_ids.extend(scheduled.new_block_ids)
            stop = scheduled.start + scheduled.num_tokens
            prompt_rows = 0
            if self.wants_prompt_rows(state.params):
                prompt_rows = max(0, min(stop, state.num_prompt_tokens - 1) - scheduled.start)
            shares.append(Share(state, scheduled.start, stop, prompt_rows, scheduled.samples))
        return shares

    def wants_prompt_rows(self, params: SamplingParams) -> bool:
        """Whether every token of the prompt gets a row of logits."""
        return params.reads_whole_prompt

    def runs(self, shares: list[Share]) -> Iterator[list[Share]]:
        """Splits a step into runs whose logits fit in memory; nearly always one.

        Only log-probabilities and means of prompts need a row of logits a token. Tokens of a sequence that
        come to a later run find those of the earlier ones in the KV cache, as any later step would.
        """
        run: list[Share] = []
        free = self._max_rows
        for whole in shares:
            rest = whole
            while rest.num_rows > free:
                first, second = _split(rest, free)
                if first is not None:
                    run.append(first)
                yield run
                run, free, rest = [], self._max_rows, second
            run.append(rest)
            free -= rest.num_rows
        if run:
            yield run


def _split(share: Share, rows: int) -> tuple[Share | None, Share]:
    """The part of a share that needs ``rows`` rows of logits, and the rest. Tokens with rows come first."""
    middle = share.start + min(rows, share.num_prompt_rows)
    if middle == share.start:
        return None, share
    first = Share(share.state, share.start, middle, middle - share.start, False)
    left = share.num_prompt_rows - first.num_prompt_rows
    return first, Share(share.state, middle, share.stop, left, share.samples)
