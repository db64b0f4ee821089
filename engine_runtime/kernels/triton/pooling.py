"""Sums of normalized hidden states: what vectors of texts are made of."""

import triton
import triton.language as tl

from engine_runtime.kernels.kernel_spec import KernelSpec
from engine_runtime.kernels.row_layout import BLOCK

ROWS = 4
"""Rows that a program reads at a time."""


@triton.jit
def pool(residual, weight, pieces, sums, H, epsilon, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """sums[i] = the sum over the rows of piece i of RMSNorm(residual[row]) * weight.

    Grid: (pieces, ceil(H / BLOCK)). residual [T, H], 16-bit; weight [H]. pieces int32 [P, 2]: first row and
    number of rows, at least 1. sums float32 [P, H]: ROWS rows are added at a time, in order. A program reads
    whole rows for their norms, and adds up its own columns.
    """
    piece = tl.program_id(0).to(tl.int64)
    first = tl.load(pieces + 2 * piece)
    count = tl.load(pieces + 2 * piece + 1)
    place = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    own = tl.program_id(1) * BLOCK + column
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, ROWS):
        exists = start + place < count
        rows = residual + (first + start + place).to(tl.int64)[:, None] * H
        squares = tl.zeros((ROWS,), tl.float32)
        for left in range(0, H, BLOCK):
            columns = left + column
            mask = exists[:, None] & (columns < H)[None, :]
            x = tl.load(rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            squares += tl.sum(x * x, 1)
        factor = tl.where(exists, tl.rsqrt(squares / H + epsilon), 0.0)
        mask = exists[:, None] & (own < H)[None, :]
        x = tl.load(rows + own[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * factor[:, None], 0)
    scale = tl.load(weight + own, mask=own < H, other=0.0).to(tl.float32)
    tl.store(sums + piece * H + own, total * scale, mask=own < H)


SPECS = [
    KernelSpec(
        pool,
        f"pool_bf16_{weight}",
        {
            "residual": "*bf16:16",
            "weight": f"*{weight}:16",
            "pieces": "*i32:16",
            "sums": "*fp32:16",
            "H": "i32:16",
            "epsilon": "fp32",
        },
        {"BLOCK": BLOCK, "ROWS": ROWS},
    )
    for weight in ("bf16", "fp32")
]
