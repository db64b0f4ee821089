"""Kernels that compile fast, and one that does not compile, for the tests of the compiler."""

import triton
import triton.language as tl

from engine_runtime.kernels.kernel_spec import KernelSpec


@triton.jit
def add(x, y, out, factor, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    tl.store(out + index, tl.load(x + index, mask=mask) + factor * tl.load(y + index, mask=mask), mask=mask)


@triton.jit
def copy_tile(source, out, ROWS: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + place, source.load([tl.program_id(0) * ROWS, 0]))


@triton.jit
def broken(x, N: tl.constexpr):
    tl.store(x, tl.arange(0, N))


_POINTERS = {"x": "*fp32:16", "y": "*fp32:16", "out": "*fp32"}
ADD = KernelSpec(add, "add", {**_POINTERS, "factor": "fp32", "n": "i32"}, {"BLOCK": 128}, num_warps=2)
COPY = KernelSpec(
    copy_tile, "copy_tile", {"source": "tensordesc<bf16[64, 64]>", "out": "*bf16:16"}, {"ROWS": 64},
    architectures=(90,),
)  # fmt: skip
SPECS = [ADD, COPY]
BROKEN = KernelSpec(broken, "broken", {"x": "*i32"}, {"N": 3})
FORGOTTEN = KernelSpec(broken, "forgotten", {}, {"N": 4})
