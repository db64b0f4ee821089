"""The first kernel of a step: token ids to rows of the embedding table."""

import triton
import triton.language as tl

from engine_runtime.kernels.kernel_spec import KernelSpec
from engine_runtime.kernels.row_layout import BLOCK


@triton.jit
def embed(
    token_ids,
    sampled_tokens,
    table,
    hidden,
    scale,
    vocab_size,
    hidden_size,
    BLOCK: tl.constexpr,
):
    """hidden[t] = table[token_ids[t]] * scale, rounded once.

    Grid: (tokens, ceil(hidden_size / BLOCK)). token_ids int32 [T]; an id < 0 stands for the token at
    sampled_tokens[-id - 1], which the host may not know yet. Ids outside the vocabulary read its first or
    last row. table [vocab_size, hidden_size] and hidden [T, hidden_size] share a 16-bit type; scale float32.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + row)
    if token < 0:
        token = tl.load(sampled_tokens - 1 - token)
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1).to(tl.int64)
    mask = columns < hidden_size
    values = tl.load(table + token * hidden_size + columns, mask=mask)
    scaled = values.to(tl.float32) * scale
    tl.store(hidden + row * hidden_size + columns, scaled.to(hidden.dtype.element_ty), mask=mask)


SPECS = [
    KernelSpec(
        embed,
        f"embed_{dtype}",
        {
            "token_ids": "*i32",
            "sampled_tokens": "*i32",
            "table": f"*{dtype}:16",
            "hidden": f"*{dtype}:16",
            "scale": "fp32",
            "vocab_size": "i32",
            "hidden_size": "i32:16",
        },
        {"BLOCK": BLOCK},
    )
    for dtype in ("bf16", "fp16")
]
