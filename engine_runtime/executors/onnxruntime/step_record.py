"""What all operators of the decoder need to know about a step: one int64 array, filled in before each run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine_runtime.kernels.cpu import StepLayout

# Work is cut into (number of things, things of a task, number of tasks).
TOKENS = 0
SAMPLED = 3
SEQUENCES = 6
UNITS = 9  # attention: a KV head of a tile
NUM_TASKS = 2  # relative to the four above

QUERY_START = 12
CONTEXT_LEN = 13
BLOCK_TABLES = 14
BLOCK_TABLE_WIDTH = 15
TILES = 16
PRODUCT_TASKS = 17  # of a packed product, at every step: each reads its share of the weights
_SIZE = 18

_TASKS_A_THREAD = 4  # so that a thread that was held up does not hold up the others
_ROWS_ALONE = 4  # so few rows take less time than to wake a thread


class StepRecord:
    """The array ``words`` and what its addresses point to."""

    def __init__(self, num_threads: int, num_kv_heads: int, group: int) -> None:
        """``group`` is the number of query heads that share a KV head."""
        self.words = np.zeros(_SIZE, np.int64)
        self.max_tasks = max(1, num_threads * _TASKS_A_THREAD)
        self.words[PRODUCT_TASKS] = 1 if num_threads == 1 else self.max_tasks
        self._num_threads = num_threads
        self._num_kv_heads = num_kv_heads
        self._group = group
        self._kept: tuple[npt.NDArray[np.int32], ...] = ()

    def fill(self, layout: StepLayout, num_sampled: int) -> None:
        """Describes a step. ``layout`` must hold at least one sequence."""
        tiles = layout.tiles(self._group)
        self._cut(TOKENS, layout.num_tokens, _ROWS_ALONE)
        self._cut(SAMPLED, num_sampled, _ROWS_ALONE)
        self._cut(SEQUENCES, layout.num_sequences, 1)
        self._cut(UNITS, len(tiles) * self._num_kv_heads, 1)
        self._kept = (layout.query_start, layout.context_len, layout.block_tables, tiles)
        words = self.words
        words[QUERY_START] = layout.query_start.ctypes.data
        words[CONTEXT_LEN] = layout.context_len.ctypes.data
        words[BLOCK_TABLES] = layout.block_tables.ctypes.data
        words[BLOCK_TABLE_WIDTH] = layout.block_tables.shape[1]
        words[TILES] = tiles.ctypes.data

    def _cut(self, place: int, count: int, least: int) -> None:
        tasks = 1 if self._num_threads == 1 else max(1, min(count // least, self.max_tasks))
        share = -(-count // tasks)
        self.words[place : place + 3] = count, share, -(-count // share) if count else 0
