"""How the GPU sampler's parameters lie in memory, for its kernels and for the host.

A row is a record in each of three arrays:

    numbers    float64 [rows, 2]
    addresses  int64 [rows, 3]
    words      int32 [rows, 12]     floats by their bits
"""

from __future__ import annotations

NUM_NUMBERS, NUM_ADDRESSES, NUM_WORDS = 2, 3, 12
BYTES_PER_ROW = 8 * NUM_NUMBERS + 8 * NUM_ADDRESSES + 4 * NUM_WORDS

TOP_P, UNIFORM = range(2)
COUNTS, CHANGES, GRAMMAR = range(3)
FLAGS, SLOT, FACTOR, TOP_K, MIN_WEIGHT, TOP_N, TARGET, NUM_CHANGES, REPETITION, FREQUENCY, PRESENCE = range(
    11
)

DRAWS = 1
FILTERS = 2
HAS_CHANGES = 4
HAS_PENALTIES = 8
HAS_GRAMMAR = 16
HAS_LOGPROBS = 32

SUBTILE = 128
MAX_SUBTILES = 2048
MAX_VOCAB_SIZE = SUBTILE * MAX_SUBTILES
TILE_SUBTILES = 32
"""Subtiles of one program of ``scan``."""

FEW = 2048
WIDE_FEW = 8192
"""Candidates of a row that ``draw``, ``draw_wide`` can gather."""

MAX_TOP = 20
"""Most likely tokens of a row that can be reported."""

MAX_CHANGES = 1024
"""A list of changes: token ids int32 [1024] ascending, values float32 [1024], room for float32 [1024]."""
CHANGES_BYTES = 12 * MAX_CHANGES

PROMPT_BIT = 0x8000
COUNT_BITS = 0x7FFF
"""A count (16 bits) of a token: PROMPT_BIT if it is in the prompt, plus how often it was generated."""
