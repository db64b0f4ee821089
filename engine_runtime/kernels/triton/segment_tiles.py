"""Which tiles of a matrix product each program of a persistent launch computes, and how W and x get to it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_wait


@gluon.jit
def num_tiles(T, N, BM: gl.constexpr, COLUMNS: gl.constexpr, SPLIT: gl.constexpr):
    """How many tiles this program computes, at least one of them if the grid is no larger than all."""
    total = gl.cdiv(T, BM) * gl.cdiv(N, COLUMNS) * SPLIT
    return gl.cdiv(total - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def tile(i, T, N, BM: gl.constexpr, COLUMNS: gl.constexpr, SPLIT: gl.constexpr):
    """The i-th tile of this program: (part of K, first token, first column of the result)."""
    tiles_m = gl.cdiv(T, BM)
    index = gl.program_id(0) + i * gl.num_programs(0)
    part = index % SPLIT
    index = index // SPLIT
    # Neighbours in time share columns of x or rows of W in the cache: 8 row tiles at a time.
    width = 8 * gl.cdiv(N, COLUMNS)
    first_m = index // width * 8
    group = gl.minimum(tiles_m - first_m, 8)
    m = (first_m + index % width % group) * BM
    n = index % width // group * COLUMNS
    return part, m, n


@gluon.jit
def copy(
    x, w, xs, ws, full, empty, T, N, K, GROUPS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """The copying warp: fills stage after stage with GROUPS blocks of x and two of W.

    The first blocks of W are on their way before the launch before has ended.
    """
    COLUMNS: gl.constexpr = BN // 2 if ACTIVATION != "" else BN
    NUM_BYTES: gl.constexpr = GROUPS * x.block_type.nbytes + 2 * w.block_type.nbytes
    steps = K // (BK * SPLIT)
    step = 0
    for i in range(num_tiles(T, N, BM, COLUMNS, SPLIT)):
        part, m, n = tile(i, T, N, BM, COLUMNS, SPLIT)
        second = n + BN // 2
        if ACTIVATION != "":
            second = n + N
        start = part * (K // SPLIT)
        ahead = gl.to_tensor(0)
        if i == 0:
            ahead = gl.minimum(steps, STAGES)
            for k in range(ahead):
                column = start + k * BK
                ready = full.index(k)
                mbarrier.expect(ready, NUM_BYTES)
                left, right = ws.index(k).slice(0, BN // 2), ws.index(k).slice(BN // 2, BN // 2)
                tma.async_copy_global_to_shared(w, [n, column], ready, left)
                tma.async_copy_global_to_shared(w, [second, column], ready, right)
            gdc_wait()
        for k in range(steps):
            column = start + k * BK
            stage = step % STAGES
            is_new = k >= ahead
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, NUM_BYTES, pred=is_new)
            for group in gl.static_range(GROUPS):
                rows = xs.index(GROUPS * stage + group)
                tma.async_copy_global_to_shared(x, [m + group * (BM // GROUPS), column], ready, rows)
            left, right = ws.index(stage).slice(0, BN // 2), ws.index(stage).slice(BN // 2, BN // 2)
            tma.async_copy_global_to_shared(w, [n, column], ready, left, pred=is_new)
            tma.async_copy_global_to_shared(w, [second, column], ready, right, pred=is_new)
            step += 1


@gluon.jit
def activate(gate, up, ACTIVATION: gl.constexpr):
    """silu(gate) * up or gelu(gate) * up (tanh form), float32."""
    if ACTIVATION == "silu":
        return gate * up / (1.0 + gl.exp(-gate))
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * up / (1.0 + gl.exp(-2.0 * z))
