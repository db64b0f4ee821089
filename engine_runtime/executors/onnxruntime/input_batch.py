"""From the scheduler's step to the arrays that one run of the decoder reads."""

from __future__ import annotations

import numpy as np

from engine_runtime.executors.sequence_table import SequenceTable, Share
from engine_runtime.kernels.cpu import StepLayout
from engine_runtime.kernels.numpy_types import Int32Array


class InputBatch(SequenceTable):
    """The sequences, and the arrays of a step on the CPU, which are reused."""

    def __init__(self, max_num_seqs: int, max_tokens: int, max_rows: int, max_blocks: int) -> None:
        """
        Args:
            max_num_seqs, max_tokens: of one step.
            max_rows: rows of logits of one run; at least ``max_num_seqs``.
            max_blocks: of one sequence.
        """
        super().__init__(max_rows)
        self._token_ids = np.zeros(max_tokens, np.int32)
        self._block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)

    def arrange(self, run: list[Share]) -> tuple[Int32Array, StepLayout, Int32Array]:
        """The arrays of a run.

        Returns:
            token ids [T]; which tokens belong to which sequence; the rows [R] whose logits are wanted, in
            order. The first is reused by the next call.
        """
        query_start = np.zeros(len(run) + 1, np.int32)
        context_len = np.zeros(len(run), np.int32)
        rows: list[int] = []
        end = 0
        for i, share in enumerate(run):
            first, end = end, end + share.stop - share.start
            self._token_ids[first:end] = share.state.token_ids.view[share.start : share.stop]
            query_start[i + 1] = end
            context_len[i] = share.stop
            blocks = share.state.block_ids
            self._block_tables[i, : len(blocks)] = blocks.view
            rows.extend(range(first, first + share.num_prompt_rows))
            if share.samples:
                rows.append(end - 1)
        layout = StepLayout(query_start, context_len, self._block_tables[: len(run)])
        return self._token_ids[:end], layout, np.array(rows, np.int32)
