"""Matrix products of a segment, y = x W^T with W [N, K] as the checkpoint holds it.

Few tokens: the weights are read once, at the speed of memory (``gemv`` for one token, ``skinny_gemm``).
Many tokens: ``tiled_gemm`` reads both operands through the tensor memory accelerator (compute capability 9).
All accumulate in float32. K is a multiple of SPLIT * BK.
"""

import triton
import triton.language as tl


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr):
    """silu(gate) * up or gelu(gate) * up, float32."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    # 0.5 (1 + tanh(z)) = sigmoid(2 z)
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(2.0 * z) * up


@triton.jit
def gemv(
    x,
    w,
    norm_weight,
    addend,
    out,
    N,
    K,
    epsilon,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """out = f(x W^T) for one token. Grid: ceil(N / BN).

    x [K], out [N]. NORM: x is first normalized (RMSNorm with ``norm_weight`` [K]), by scaling the result.
    ADD: ``addend`` [N], a residual or a bias, is added. ACTIVATION "silu" or "gelu": W is [2 N, K], gate
    rows first, and the result is activation(gate) * up; "": none.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns = tl.arange(0, BK)
    weights = w + tl.minimum(rows, N - 1)[:, None].to(tl.int64) * K + columns[None, :]
    up_offset = N.to(tl.int64) * K
    acc = tl.zeros((BN, BK), tl.float32)
    acc_up = tl.zeros((BN, BK), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        wk = tl.load(weights + k, eviction_policy="evict_first").to(tl.float32)
        xk = tl.load(x + k + columns).to(tl.float32)
        if ACTIVATION != "":
            uk = tl.load(weights + up_offset + k, eviction_policy="evict_first").to(tl.float32)
        if NORM:
            squares += xk * xk
            xk = (xk * tl.load(norm_weight + k + columns).to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
        acc += wk * xk[None, :]
        if ACTIVATION != "":
            acc_up += uk * xk[None, :]
    y = tl.sum(acc, 1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + epsilon)
        y = y * scale
    if ACTIVATION != "":
        y = _activate(y, tl.sum(acc_up, 1) * scale, ACTIVATION)
    mask = rows < N
    if ADD:
        y += tl.load(addend + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def skinny_gemm(
    x,
    w,
    bias,
    out,
    T,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """out = f(x W^T) for T <= BM tokens. Grid: (ceil(N / BN), SPLIT).

    x [T, K], out [SPLIT, T, N]: each part sums K / SPLIT columns, and whoever reads it adds them up. BIAS
    (``bias`` [N]) and ACTIVATION as in ``gemv``, with SPLIT 1 only.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    tokens = tl.arange(0, BM)
    columns = tl.arange(0, BK)
    length = K // SPLIT
    first = part * length
    weights = w + tl.minimum(rows, N - 1)[:, None].to(tl.int64) * K + (first + columns)[None, :]
    inputs = x + tl.minimum(tokens, T - 1)[:, None] * K + (first + columns)[None, :]
    up_offset = N.to(tl.int64) * K
    acc = tl.zeros((BM, BN), tl.float32)
    acc_up = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, length, BK, num_stages=STAGES):
        wk = tl.load(weights + k, eviction_policy="evict_first")
        if ACTIVATION != "":
            uk = tl.load(weights + up_offset + k, eviction_policy="evict_first")
        xk = tl.load(inputs + k)
        acc = tl.dot(xk, wk.T, acc)
        if ACTIVATION != "":
            acc_up = tl.dot(xk, uk.T, acc_up)
    if BIAS:
        acc += tl.load(bias + tl.minimum(rows, N - 1)).to(tl.float32)[None, :]
    if ACTIVATION != "":
        acc = _activate(acc, acc_up, ACTIVATION)
    offsets = (part * T + tokens)[:, None].to(tl.int64) * N + rows[None, :]
    mask = (tokens < T)[:, None] & (rows < N)[None, :]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def tiled_gemm(
    x,
    w,
    bias,
    out,
    T,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """out = f(x W^T) for many tokens. Grid: min(PROGRAMS, tiles * SPLIT), or all of them if PROGRAMS is 0.

    x: descriptor [T, K] of blocks [BM, BK]. w: descriptor of blocks [BN, BK]; with ACTIVATION, BN rows of
    gate and as many of up are one tile. out [SPLIT, T, N], and BIAS as in ``skinny_gemm``.
    """
    tiles_m = tl.cdiv(T, BM)
    tiles_n = tl.cdiv(N, BN)
    total = tiles_m * tiles_n * SPLIT
    length = K // SPLIT
    step = PROGRAMS if PROGRAMS > 0 else total
    for index in tl.range(tl.program_id(0), total, step):
        part = index % SPLIT
        tile = index // SPLIT
        # Neighbours in time share columns of x or rows of w in the cache: 8 row tiles at a time.
        width = 8 * tiles_n
        first_m = tile // width * 8
        group = tl.minimum(tiles_m - first_m, 8)
        m = (first_m + tile % width % group) * BM
        n = tile % width // group * BN
        acc = tl.zeros((BM, BN), tl.float32)
        acc_up = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(part * length, (part + 1) * length, BK):
            xk = x.load([m, k])
            acc = tl.dot(xk, w.load([n, k]).T, acc)
            if ACTIVATION != "":
                acc_up = tl.dot(xk, w.load([N + n, k]).T, acc_up)
        tokens = m + tl.arange(0, BM)
        rows = n + tl.arange(0, BN)
        if BIAS:
            acc += tl.load(bias + tl.minimum(rows, N - 1)).to(tl.float32)[None, :]
        if ACTIVATION != "":
            acc = _activate(acc, acc_up, ACTIVATION)
        offsets = (part * T + tokens)[:, None].to(tl.int64) * N + rows[None, :]
        mask = (tokens < T)[:, None] & (rows < N)[None, :]
        tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)
