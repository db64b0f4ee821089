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
def _copy_rows(w, ws, n, column, ready, N, BN: gl.constexpr, ACTIVATION: gl.constexpr, pred=True):
    """The tile's rows of W, block by block; with ACTIVATION of gate and of up in turns."""
    ROWS: gl.constexpr = w.block_type.shape[0]
    for block in gl.static_range(BN // ROWS):
        row = n + block * ROWS
        if ACTIVATION != "":
            row = n + block // 2 * ROWS + block % 2 * N
        tma.async_copy_global_to_shared(w, [row, column], ready, ws.slice(block * ROWS, ROWS), pred=pred)


@gluon.jit
def copy(
    operands, REST: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, SPLIT: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """The copying warp: fills stage after stage with blocks of x and of W.

    ``xs`` holds the blocks of all but the last REST rows of x, one behind the other, and ``rest`` those. The
    first blocks of W are on their way before the launch before has ended.
    """
    x, w, xs, rest, ws, full, empty, T, N, K = operands
    COLUMNS: gl.constexpr = BN // 2 if ACTIVATION != "" else BN
    ROWS: gl.constexpr = x.block_type.shape[0]
    BLOCKS: gl.constexpr = (BM - REST) // ROWS
    W_BLOCKS: gl.constexpr = BN // w.block_type.shape[0]
    NUM_BYTES: gl.constexpr = BM // ROWS * x.block_type.nbytes + W_BLOCKS * w.block_type.nbytes
    steps = K // (BK * SPLIT)
    step = 0
    for i in range(num_tiles(T, N, BM, COLUMNS, SPLIT)):
        part, m, n = tile(i, T, N, BM, COLUMNS, SPLIT)
        start = part * (K // SPLIT)
        ahead = gl.to_tensor(0)
        if i == 0:
            ahead = gl.minimum(steps, STAGES)
            for k in range(ahead):
                ready = full.index(k)
                mbarrier.expect(ready, NUM_BYTES)
                _copy_rows(w, ws.index(k), n, start + k * BK, ready, N, BN, ACTIVATION)
            gdc_wait()
        for k in range(steps):
            column = start + k * BK
            stage = step % STAGES
            is_new = k >= ahead
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, NUM_BYTES, pred=is_new)
            for block in gl.static_range(BLOCKS):
                rows = xs.index(BLOCKS * stage + block)
                tma.async_copy_global_to_shared(x, [m + block * ROWS, column], ready, rows)
            if REST > 0:
                tma.async_copy_global_to_shared(x, [m + BM - REST, column], ready, rest.index(stage))
            _copy_rows(w, ws.index(stage), n, column, ready, N, BN, ACTIVATION, pred=is_new)
            step += 1


@gluon.jit
def activate(gate, up, ACTIVATION: gl.constexpr):
    """silu(gate) * up or gelu(gate) * up (tanh form), float32."""
    if ACTIVATION == "silu":
        return gate * up / (1.0 + gl.exp(-gate))
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * up / (1.0 + gl.exp(-2.0 * z))
