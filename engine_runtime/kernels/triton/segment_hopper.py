"""``tiled_gemm`` for compute capability 9.0, in Gluon: a warp that copies beside warps that multiply.

A program lives as long as the launch and computes one tile after the other. One warp copies x and W to shared
memory, as far ahead as there is room: into the next tile too. Two or three groups of four warps multiply,
each its part of a tile's rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine_runtime.kernels.triton.segment_tiles import activate, copy, num_tiles, tile


@gluon.jit
def _halves(acc, ROWS: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """The left and the right columns; no data moves."""
    left, right = gl.split(gl.permute(gl.reshape(acc, [ROWS, 2, BN // 2]), (0, 2, 1)))
    left = gl.convert_layout(left, LAYOUT, assert_trivial=True)
    right = gl.convert_layout(right, LAYOUT, assert_trivial=True)
    return left, right


@gluon.jit
def _scaled(y, x_scale, w_scale, m, row, rows, T, LAYOUT: gl.constexpr):
    """y times the factors of tokens m and following, and of rows ``row`` and following of ``rows`` of W."""
    token = m + gl.arange(0, y.shape[0], gl.SliceLayout(1, LAYOUT))
    column = row + gl.arange(0, y.shape[1], gl.SliceLayout(0, LAYOUT))
    of_token = gl.load(x_scale + gl.minimum(token, T - 1))
    return y * of_token[:, None] * gl.load(w_scale + gl.minimum(column, rows - 1))[None, :]


@gluon.jit
def _write(out, y, part, m, n, T, N, LAYOUT: gl.constexpr):
    """Rows m and following, columns n and following, of a part of ``out``."""
    token = m + gl.arange(0, y.shape[0], gl.SliceLayout(1, LAYOUT))
    column = n + gl.arange(0, y.shape[1], gl.SliceLayout(0, LAYOUT))
    offsets = (part * T + token).to(gl.int64)[:, None] * N + column[None, :]
    gl.store(out + offsets, y, mask=(token < T)[:, None] & (column < N)[None, :])


@gluon.jit
def _finish(
    out, acc, x_scale, w_scale, part, m, n, T, N,
    ROWS: gl.constexpr, BN: gl.constexpr, ACTIVATION: gl.constexpr, SCALED: gl.constexpr,
    SIDE: gl.constexpr,
):  # fmt: skip
    """Scales, activates and writes the sums of ROWS rows from m on."""
    HALF: gl.constexpr = BN // 2
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [4, 1], [1, 0])
    DTYPE: gl.constexpr = out.dtype.element_ty
    left, right = _halves(acc, ROWS, BN, SIDE)
    if ACTIVATION != "":
        second = N + n
        rows = 2 * N
    else:
        second = n + HALF
        rows = N
    if SCALED:
        left = _scaled(left, x_scale, w_scale, m, n, rows, T, SIDE)
        right = _scaled(right, x_scale, w_scale, m, second, rows, T, SIDE)
    if ACTIVATION != "":
        result = activate(left, right, ACTIVATION).to(DTYPE)
        _write(out, gl.convert_layout(result, PLAIN), part, m, n, T, N, PLAIN)
    elif gl.float32 == DTYPE:
        # A warp writes whole sectors of 32 bytes as it is.
        _write(out, left, part, m, n, T, N, SIDE)
        _write(out, right, part, m, second, T, N, SIDE)
    else:
        _write(out, gl.convert_layout(left.to(DTYPE), PLAIN), part, m, n, T, N, PLAIN)
        _write(out, gl.convert_layout(right.to(DTYPE), PLAIN), part, m, second, T, N, PLAIN)


@gluon.jit
def _multiply(
    operands, GROUP: gl.constexpr, GROUPS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr, ACTIVATION: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    """Four warps that compute part GROUP of the rows of each tile."""
    xs, ws, full, empty, x_scale, w_scale, out, T, N, K = operands
    COLUMNS: gl.constexpr = BN // 2 if ACTIVATION != "" else BN
    ROWS: gl.constexpr = BM // GROUPS
    DEPTH: gl.constexpr = 256 // xs.dtype.primitive_bitwidth
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, DEPTH])
    SIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN // 2, DEPTH])
    gdc_wait()
    step = 0
    for i in range(num_tiles(T, N, BM, COLUMNS, SPLIT)):
        part, m, n = tile(i, T, N, BM, COLUMNS, SPLIT)
        acc = gl.zeros([ROWS, BN], gl.float32, ACC)
        for k in range(K // (BK * SPLIT)):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            rows = xs.index(GROUPS * stage + GROUP)
            acc = warpgroup_mma(rows, ws.index(stage).permute((1, 0)), acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        _finish(
            out, acc, x_scale, w_scale, part, m + GROUP * ROWS, n, T, N, ROWS, BN, ACTIVATION, SCALED, SIDE
        )


@gluon.jit
def hopper_gemm(
    x,
    x_scale,
    w,
    w_scale,
    out,
    T,
    N,
    K,
    GROUPS: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SCALED: gl.constexpr,
):
    """out = f(x W^T) for many tokens. Grid: a program for each multiprocessor, at most tiles * SPLIT.

    x: descriptor [T, K] of blocks [BM / GROUPS, BK], GROUPS 2 or 3. w: descriptor of blocks [BN / 2, BK];
    with ACTIVATION, BN / 2 rows of gate and as many of up are one tile. out [SPLIT, T, N] as in
    ``skinny_gemm``.
    """
    gdc_launch_dependents()
    xs = gl.allocate_shared_memory(x.dtype, [GROUPS * STAGES, BM // GROUPS, BK], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, BN, BK], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    operands = xs, ws, full, empty, x_scale, w_scale, out, T, N, K
    copied = x, w, xs, xs, ws, full, empty, T, N, K
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (operands, 0, GROUPS, BM, BN, BK, STAGES, SPLIT, ACTIVATION, SCALED)),
                (_multiply, (operands, 1, GROUPS, BM, BN, BK, STAGES, SPLIT, ACTIVATION, SCALED)),
                (copy, (copied, 0, BM, BN, BK, STAGES, SPLIT, ACTIVATION)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (operands, 0, GROUPS, BM, BN, BK, STAGES, SPLIT, ACTIVATION, SCALED)),
                (_multiply, (operands, 1, GROUPS, BM, BN, BK, STAGES, SPLIT, ACTIVATION, SCALED)),
                (_multiply, (operands, 2, GROUPS, BM, BN, BK, STAGES, SPLIT, ACTIVATION, SCALED)),
                (copy, (copied, 0, BM, BN, BK, STAGES, SPLIT, ACTIVATION)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
