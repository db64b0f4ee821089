"""``skinny_gemm`` for compute capability 9.0, in Gluon.

As in ``segment_hopper.py``, a warp copies and four multiply. They compute out^T = W x^T: rows of W fill the
64 rows of the instruction, tokens its columns. Launched early, a program fetches its first blocks of W, which
fill its shared memory, before the launch before has ended.
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
def _scaled(y, x_scale, w_scale, row, rows, T, LAYOUT: gl.constexpr):
    """y^T times the factors of tokens, and of rows ``row`` and following of ``rows`` of W."""
    row = row + gl.arange(0, y.shape[0], gl.SliceLayout(1, LAYOUT))
    token = gl.arange(0, y.shape[1], gl.SliceLayout(0, LAYOUT))
    of_row = gl.load(w_scale + gl.minimum(row, rows - 1))
    return y * of_row[:, None] * gl.load(x_scale + gl.minimum(token, T - 1))[None, :]


@gluon.jit
def _finish(
    out, acc, x_scale, w_scale, part, n, T, N,
    BM: gl.constexpr, COLUMNS: gl.constexpr, ACTIVATION: gl.constexpr, SCALED: gl.constexpr,
    ACC: gl.constexpr,
):  # fmt: skip
    """Scales, activates and writes the sums of COLUMNS columns of ``out`` from n on."""
    PLAIN: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    if ACTIVATION != "":
        gate, up = gl.split(gl.permute(gl.reshape(acc, [2, COLUMNS, BM]), (1, 2, 0)))
        gate = gl.convert_layout(gate, ACC, assert_trivial=True)
        up = gl.convert_layout(up, ACC, assert_trivial=True)
        if SCALED:
            gate = _scaled(gate, x_scale, w_scale, n, 2 * N, T, ACC)
            up = _scaled(up, x_scale, w_scale, N + n, 2 * N, T, ACC)
        acc = activate(gate, up, ACTIVATION)
    elif SCALED:
        acc = _scaled(acc, x_scale, w_scale, n, N, T, ACC)
    result = gl.convert_layout(acc.to(out.dtype.element_ty), PLAIN)
    row = n + gl.arange(0, COLUMNS, gl.SliceLayout(1, PLAIN))
    token = gl.arange(0, BM, gl.SliceLayout(0, PLAIN))
    offsets = (part * T + token).to(gl.int64)[None, :] * N + row[:, None]
    gl.store(out + offsets, result, mask=(token < T)[None, :] & (row < N)[:, None])


@gluon.jit
def _multiply(
    xs, ws, full, empty, x_scale, w_scale, out, T, N, K,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    ACTIVATION: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """The multiplying warps."""
    COLUMNS: gl.constexpr = BN // 2 if ACTIVATION != "" else BN
    DEPTH: gl.constexpr = 256 // xs.dtype.primitive_bitwidth
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, DEPTH])
    gdc_wait()
    step = 0
    for i in range(num_tiles(T, N, BM, COLUMNS, SPLIT)):
        part, _m, n = tile(i, T, N, BM, COLUMNS, SPLIT)
        acc = gl.zeros([BN, BM], gl.float32, ACC)
        for k in range(K // (BK * SPLIT)):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            columns = xs.index(stage).permute((1, 0))
            acc = warpgroup_mma(ws.index(stage), columns, acc, use_acc=k > 0, is_async=True)
            # Products take a fraction of the time of the copies, so the room is given back at once.
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
        _finish(out, acc, x_scale, w_scale, part, n, T, N, BM, COLUMNS, ACTIVATION, SCALED, ACC)


@gluon.jit
def thin_gemm(
    x,
    x_scale,
    w,
    w_scale,
    out,
    T,
    N,
    K,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SCALED: gl.constexpr,
):
    """out = f(x W^T) for T <= BM tokens. As ``hopper_gemm``, but blocks of x are [BM, BK]."""
    gdc_launch_dependents()
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, BM, BK], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, BN, BK], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    xs, ws, full, empty, x_scale, w_scale, out, T, N, K,
                    BM, BN, BK, STAGES, SPLIT, ACTIVATION, SCALED,
                ),
            ),
            (copy, (x, w, xs, ws, full, empty, T, N, K, 1, BM, BN, BK, STAGES, SPLIT, ACTIVATION)),
        ],
        [1],
        [24],
    )  # fmt: skip
