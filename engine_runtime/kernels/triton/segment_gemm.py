"""Matrix products of a segment, y = x W^T with W [N, K] as the checkpoint holds it.

Few tokens: the weights are read once, at the speed of memory (``gemv`` for one token, ``skinny_gemm``).
More: ``tiled_gemm`` reads both operands through the tensor memory accelerator (compute capability 9). For
compute capability 9 there are also ``segment_thin.py``, up to 192 tokens, and ``segment_hopper.py``, from 65.
All accumulate in float32. K is a multiple of BK, or of SPLIT * BK.

SCALED: W is E4M3 with a float32 factor for each row (``w_scale`` [N]), and so is x for each token
(``x_scale`` [T]), except in ``gemv``, whose x keeps 16 bits.
"""

import triton
import triton.language as tl


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr):
    """silu(gate) * up or gelu(gate) * up (tanh form), float32."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    # 0.5 (1 + tanh(z)) = sigmoid(2 z)
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(2.0 * z) * up


@triton.jit
def gemv(
    x,
    w,
    w_scale,
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
    SCALED: tl.constexpr,
):
    """out = f(x W^T) for one token. Grid: ceil(N / BN).

    x [K], out [N]. NORM: x is first normalized (RMSNorm with ``norm_weight`` [K]), by scaling the result.
    ADD: ``addend`` [N], a residual or a bias, is added. ACTIVATION "silu" or "gelu": W is [2 N, K], gate
    rows first, and the result is activation(gate) * up; "": none.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    last = tl.minimum(rows, N - 1)
    columns = tl.arange(0, BK)
    weights = w + last[:, None].to(tl.int64) * K + columns[None, :]
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
            xk = (
                (xk * tl.load(norm_weight + k + columns).to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
            )
        acc += wk * xk[None, :]
        if ACTIVATION != "":
            acc_up += uk * xk[None, :]
    y = tl.sum(acc, 1)
    if NORM:
        norm_scale = tl.rsqrt(tl.sum(squares, 0) / K + epsilon)
        y = y * norm_scale
    if SCALED:
        y = y * tl.load(w_scale + last)
    if ACTIVATION != "":
        up = tl.sum(acc_up, 1)
        if NORM:
            up = up * norm_scale
        if SCALED:
            up = up * tl.load(w_scale + N + last)
        y = _activate(y, up, ACTIVATION)
    mask = rows < N
    if ADD:
        y += tl.load(addend + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def skinny_gemm(
    x,
    x_scale,
    w,
    w_scale,
    out,
    T,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
):
    """out = f(x W^T) for T <= BM tokens. Grid: (ceil(N / BN), SPLIT).

    x [T, K], out [SPLIT, T, N]: each part sums K / SPLIT columns, and whoever reads it adds them up.
    ACTIVATION as in ``gemv``, with SPLIT 1 only.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    tokens = tl.arange(0, BM)
    columns = tl.arange(0, BK)
    length = K // SPLIT
    first = part * length
    last = tl.minimum(rows, N - 1)
    weights = w + last[:, None].to(tl.int64) * K + (first + columns)[None, :]
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
    if SCALED:
        token_scale = tl.load(x_scale + tl.minimum(tokens, T - 1))[:, None]
        acc = acc * token_scale * tl.load(w_scale + last)[None, :]
    if ACTIVATION != "":
        if SCALED:
            acc_up = acc_up * token_scale * tl.load(w_scale + N + last)[None, :]
        acc = _activate(acc, acc_up, ACTIVATION)
    offsets = (part * T + tokens)[:, None].to(tl.int64) * N + rows[None, :]
    mask = (tokens < T)[:, None] & (rows < N)[None, :]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def tiled_gemm(
    x,
    x_scale,
    w,
    w_scale,
    out,
    T,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
):
    """out = f(x W^T) for many tokens. Grid: tiles * SPLIT.

    x: descriptor [T, K] of blocks [BM, BK]. w: descriptor of blocks [BN, BK]; with ACTIVATION, BN rows of
    gate and as many of up are one tile. out [SPLIT, T, N] as in ``skinny_gemm``.
    """
    tiles_m = tl.cdiv(T, BM)
    length = K // SPLIT
    part = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // SPLIT
    # Neighbours in time share columns of x or rows of w in the cache: 8 row tiles at a time.
    width = 8 * tl.cdiv(N, BN)
    first_m = tile // width * 8
    group = tl.minimum(tiles_m - first_m, 8)
    m = (first_m + tile % width % group) * BM
    n = tile % width // group * BN
    acc = tl.zeros((BM, BN), tl.float32)
    acc_up = tl.zeros((BM, BN), tl.float32)
    for k in range(part * length, (part + 1) * length, BK):
        xk = x.load([m, k])
        acc = tl.dot(xk, w.load([n, k]).T, acc)
        if ACTIVATION != "":
            acc_up = tl.dot(xk, w.load([N + n, k]).T, acc_up)
    tokens = m + tl.arange(0, BM)
    rows = n + tl.arange(0, BN)
    if SCALED:
        last = tl.minimum(rows, N - 1)
        token_scale = tl.load(x_scale + tl.minimum(tokens, T - 1))[:, None]
        acc = acc * token_scale * tl.load(w_scale + last)[None, :]
    if ACTIVATION != "":
        if SCALED:
            acc_up = acc_up * token_scale * tl.load(w_scale + N + last)[None, :]
        acc = _activate(acc, acc_up, ACTIVATION)
    offsets = (part * T + tokens)[:, None].to(tl.int64) * N + rows[None, :]
    mask = (tokens < T)[:, None] & (rows < N)[None, :]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)
