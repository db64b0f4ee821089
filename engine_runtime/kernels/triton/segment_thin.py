"""``skinny_gemm`` for compute capability 9.0, and for up to 192 tokens, in Gluon.

As in ``segment_hopper.py``, a warp copies and groups of four multiply. They compute out^T = W x^T: rows of W
fill the 64 rows of the instruction, tokens its columns, so that few tokens are hardly padded, and a program
can have many rows of W for each time that it reads x. Launched early, a program fetches its first blocks of
W, which fill its shared memory, before the launch before has ended.
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
def _scaled(y, x_scale, w_scale, row, rows, m, T, LAYOUT: gl.constexpr):
    """y^T times the factors of tokens m and following, and of rows ``row`` and following of ``rows`` of W."""
    row = row + gl.arange(0, y.shape[0], gl.SliceLayout(1, LAYOUT))
    token = m + gl.arange(0, y.shape[1], gl.SliceLayout(0, LAYOUT))
    of_row = gl.load(w_scale + gl.minimum(row, rows - 1))
    return y * of_row[:, None] * gl.load(x_scale + gl.minimum(token, T - 1))[None, :]


@gluon.jit
def _write(out, y, part, m, n, T, N, LAYOUT: gl.constexpr):
    """y^T to tokens m and following, columns n and following, of a part of ``out``."""
    row = n + gl.arange(0, y.shape[0], gl.SliceLayout(1, LAYOUT))
    token = m + gl.arange(0, y.shape[1], gl.SliceLayout(0, LAYOUT))
    offsets = (part * T + token).to(gl.int64)[None, :] * N + row[:, None]
    gl.store(out + offsets, y, mask=(token < T)[None, :] & (row < N)[:, None])


@gluon.jit
def _finish(
    out, acc, x_scale, w_scale, part, m, n, T, N, ACTIVATION: gl.constexpr, SCALED: gl.constexpr
):  # fmt: skip
    """Scales, activates and writes the sums of columns n and following of ``out``, tokens m and following."""
    TOKENS: gl.constexpr = acc.shape[1]
    DEPTH: gl.constexpr = acc.type.layout.instr_shape[2]
    if TOKENS > 64:
        # Shared memory for the change of layout is short.
        HALF: gl.constexpr = TOKENS // 2
        SIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, DEPTH])
        left, right = gl.split(gl.permute(gl.reshape(acc, [acc.shape[0], 2, HALF]), (0, 2, 1)))
        left = gl.convert_layout(left, SIDE, assert_trivial=True)
        right = gl.convert_layout(right, SIDE, assert_trivial=True)
        _finish(out, left, x_scale, w_scale, part, m, n, T, N, ACTIVATION, SCALED)
        _finish(out, right, x_scale, w_scale, part, m + HALF, n, T, N, ACTIVATION, SCALED)
    else:
        ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, DEPTH])
        PLAIN: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
        if ACTIVATION != "":
            COLUMNS: gl.constexpr = acc.shape[0] // 2
            gate, up = gl.split(gl.permute(gl.reshape(acc, [2, COLUMNS, TOKENS]), (1, 2, 0)))
            gate = gl.convert_layout(gate, ACC, assert_trivial=True)
            up = gl.convert_layout(up, ACC, assert_trivial=True)
            if SCALED:
                gate = _scaled(gate, x_scale, w_scale, n, 2 * N, m, T, ACC)
                up = _scaled(up, x_scale, w_scale, N + n, 2 * N, m, T, ACC)
            acc = activate(gate, up, ACTIVATION)
        elif SCALED:
            acc = _scaled(acc, x_scale, w_scale, n, N, m, T, ACC)
        result = acc.to(out.dtype.element_ty)
        if gl.float32 == result.dtype:
            # A warp writes whole sectors of 32 bytes as it is.
            _write(out, result, part, m, n, T, N, ACC)
        else:
            _write(out, gl.convert_layout(result, PLAIN), part, m, n, T, N, PLAIN)


@gluon.jit
def _multiply(
    operands, GROUP: gl.constexpr, GROUPS: gl.constexpr, BM: gl.constexpr, REST: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    ACTIVATION: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Four warps that compute part GROUP of the columns of each tile of ``out``."""
    xs, rest, ws, full, empty, x_scale, w_scale, out, T, N, K = operands
    COLUMNS: gl.constexpr = BN // 2 if ACTIVATION != "" else BN
    ROWS: gl.constexpr = BN // GROUPS
    MAIN: gl.constexpr = BM - REST
    DEPTH: gl.constexpr = 256 // xs.dtype.primitive_bitwidth
    # For few tokens, products take a fraction of the time of the copies: the room is given back at once.
    UNDER_WAY: gl.constexpr = 0 if BM <= 64 else 1 if REST == 0 else 2
    gdc_wait()
    step = 0
    for i in range(num_tiles(T, N, BM, COLUMNS, SPLIT)):
        part, _m, n = tile(i, T, N, BM, COLUMNS, SPLIT)
        acc = gl.zeros([ROWS, MAIN], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, DEPTH]))
        if REST > 0:
            more = gl.zeros(
                [ROWS, REST], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, DEPTH])
            )
        for k in range(K // (BK * SPLIT)):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            rows = ws.index(stage).slice(GROUP * ROWS, ROWS)
            columns = xs.index(stage).permute((1, 0))
            acc = warpgroup_mma(rows, columns, acc, use_acc=k > 0, is_async=True)
            if REST > 0:
                columns = rest.index(stage).permute((1, 0))
                more = warpgroup_mma(rows, columns, more, use_acc=k > 0, is_async=True)
                acc, more = warpgroup_mma_wait(UNDER_WAY, deps=[acc, more])
            else:
                acc = warpgroup_mma_wait(UNDER_WAY, deps=[acc])
            if UNDER_WAY == 0:
                mbarrier.arrive(empty.index(stage), count=1)
            else:
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        if UNDER_WAY > 0:
            if REST > 0:
                acc, more = warpgroup_mma_wait(0, deps=[acc, more])
            else:
                acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        n += GROUP * (COLUMNS // GROUPS)
        _finish(out, acc, x_scale, w_scale, part, 0, n, T, N, ACTIVATION, SCALED)
        if REST > 0:
            _finish(out, more, x_scale, w_scale, part, MAIN, n, T, N, ACTIVATION, SCALED)


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
    GROUPS: gl.constexpr,
    BM: gl.constexpr,
    REST: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SCALED: gl.constexpr,
):
    """out = f(x W^T) for T <= BM tokens, as ``hopper_gemm``.

    Shapes are powers of two, and 96 tokens, say, one of 64 beside one of 32, the REST. x: descriptor of
    blocks [REST or BM, BK]. w: of blocks of BN / 2 rows; with ACTIVATION, BN / (2 GROUPS).
    """
    gdc_launch_dependents()
    MAIN: gl.constexpr = BM - REST
    ROWS: gl.constexpr = x.block_type.shape[0]
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, MAIN, BK], x.layout)
    blocks = xs
    rest = xs
    if REST > 0:
        blocks = xs._reinterpret(x.dtype, [STAGES * (MAIN // ROWS), ROWS, BK], x.layout)
        rest = gl.allocate_shared_memory(x.dtype, [STAGES, REST, BK], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, BN, BK], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    operands = xs, rest, ws, full, empty, x_scale, w_scale, out, T, N, K
    copied = x, w, blocks, rest, ws, full, empty, T, N, K
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply, (operands, 0, 1, BM, REST, BN, BK, STAGES, SPLIT, ACTIVATION, SCALED)),
                (copy, (copied, REST, BM, BN, BK, STAGES, SPLIT, ACTIVATION)),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (operands, 0, 2, BM, REST, BN, BK, STAGES, SPLIT, ACTIVATION, SCALED)),
                (_multiply, (operands, 1, 2, BM, REST, BN, BK, STAGES, SPLIT, ACTIVATION, SCALED)),
                (copy, (copied, REST, BM, BN, BK, STAGES, SPLIT, ACTIVATION)),
            ],
            [4, 1],
            [240, 24],
        )
