"""``prefill_attention`` for compute capability 9.0, in Gluon: warps that copy beside warps that multiply.

A program lives as long as the launch and takes one unit (a tile and a KV head) after the other. One warp
copies keys and values to shared memory, 128 positions at a time, as far ahead as there is room: into the next
unit too. Two groups of four warps compute 64 rows each, in turns: while one has its exponentials, the other
multiplies (FlashAttention-3, arXiv:2407.08608). Tensor cores do not wait at the end of a unit either: a step
multiplies its queries by keys and the weights of the step before by values, also where that belongs to the
unit before.

Keys are taken from the last to the first, so that the first step of a unit is the one at the diagonal.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine_runtime.kernels import attention_layout

NOTHING = gl.constexpr(attention_layout.NOTHING)
STEP_BLOCKS = gl.constexpr(2)


@gluon.jit
def _index(turn):
    """The unit of this program in a turn. They are sorted by length: every other turn goes backwards."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, place, programs - 1 - place)


@gluon.jit
def _inverse(num_kv_heads):
    """For ``_split``: 2^32 / num_kv_heads, rounded up; 0 for one."""
    return 0xFFFFFFFF // num_kv_heads.to(gl.uint32) + 1


@gluon.jit
def _split(unit, kv_inverse, num_kv_heads):
    """(tile, KV head) of a unit, exact where unit * num_kv_heads < 2^32; a division takes 60 instructions."""
    quotient = (unit.to(gl.uint32).to(gl.uint64) * kv_inverse) >> 32
    tile = gl.where(kv_inverse == 0, unit, quotient.to(gl.int32))
    return tile, unit - tile * num_kv_heads


@gluon.jit
def _record(turn, tiles, num_units, kv_inverse, num_kv_heads):
    """(sequence, first row, number of tokens, position of the first) of this program's unit in a turn."""
    tile, _kv_head = _split(gl.minimum(_index(turn), num_units - 1), kv_inverse, num_kv_heads)
    record = tiles + tile * 4
    return gl.load(record), gl.load(record + 1), gl.load(record + 2), gl.load(record + 3)


@gluon.jit
def _steps(low, num_tokens, window, BLOCK_SIZE: gl.constexpr, WINDOWED: gl.constexpr):
    """The first block that a tile sees, how many, and in how many steps."""
    first = 0
    if WINDOWED:
        first = gl.maximum(low - window + 1, 0) // BLOCK_SIZE
    count = gl.cdiv(low + num_tokens, BLOCK_SIZE) - first
    return first, count, gl.cdiv(count, STEP_BLOCKS)


@gluon.jit
def _copy_blocks(cache, row_left, row_right, ready, boxes, stage, PARTS: gl.constexpr):
    """Starts copying two blocks, as one tile, to the boxes of a stage."""
    mbarrier.expect(ready, 2 * PARTS * cache.block_type.nbytes)
    for part in gl.static_range(PARTS):
        box = (stage * PARTS + part) * 2
        column = part * cache.block_shape[1]
        tma.async_copy_global_to_shared(cache, [row_left, column], ready, boxes.index(box))
        tma.async_copy_global_to_shared(cache, [row_right, column], ready, boxes.index(box + 1))


@gluon.jit
def _copy(
    cache, key_boxes, value_boxes, k_full, k_empty, v_full, v_empty, tiles, block_tables, table_stride,
    num_tiles, num_kv_heads, window, PARTS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
    WINDOWED: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    num_units = num_tiles * num_kv_heads
    offset = num_kv_heads * BLOCK_SIZE
    kv_inverse = _inverse(num_kv_heads)
    step = 0
    for turn in range(gl.cdiv(num_units, gl.num_programs(0))):
        sequence, _row, num_tokens, low = _record(turn, tiles, num_units, kv_inverse, num_kv_heads)
        if (_index(turn) < num_units) & (sequence >= 0):
            _tile, kv_head = _split(_index(turn), kv_inverse, num_kv_heads)
            first, count, num_steps = _steps(low, num_tokens, window, BLOCK_SIZE, WINDOWED)
            table = block_tables + sequence.to(gl.int64) * table_stride + first
            block = STEP_BLOCKS * (num_steps - 1)
            left = gl.load(table + block)
            right = gl.load(table + gl.minimum(block + 1, count - 1))
            if turn == 0:
                gdc_wait()  # for the launch that wrote keys and values
            for _ in range(num_steps):
                block = gl.maximum(block - STEP_BLOCKS, 0)
                next_left = gl.load(table + block)
                next_right = gl.load(table + gl.minimum(block + 1, count - 1))
                stage = step % STAGES
                phase = (step // STAGES) & 1
                row_left = (left * 2 * num_kv_heads + kv_head) * BLOCK_SIZE
                row_right = (right * 2 * num_kv_heads + kv_head) * BLOCK_SIZE
                mbarrier.wait(k_empty.index(stage), phase ^ 1)
                _copy_blocks(cache, row_left, row_right, k_full.index(stage), key_boxes, stage, PARTS)
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                _copy_blocks(
                    cache, row_left + offset, row_right + offset, v_full.index(stage), value_boxes, stage,
                    PARTS,
                )  # fmt: skip
                left, right = next_left, next_right
                step += 1


@gluon.jit
def _logits(rows, keys, stage, LOGITS: gl.constexpr, WIDTH: gl.constexpr):
    """Starts q K^T for a step: one product for both blocks, since q is read anew for each."""
    zeros = gl.zeros([64, WIDTH], gl.float32, LOGITS)
    return warpgroup_mma(rows, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _weigh(
    logits, largest, total, key, newest, oldest, scale, cap, MASKED: gl.constexpr,
    SOFTCAP: gl.constexpr, WIDTH: gl.constexpr, WINDOWED: gl.constexpr, LOGITS: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax, for keys at ``key`` and following; see ``attention_tile.weigh``.

    newest, oldest: int32 [64], positions of the keys that each row sees; the oldest counts if WINDOWED.
    """
    if SOFTCAP:
        logits = cap - 2.0 * cap / (1.0 + gl.exp2(logits * scale))
        factor = 1.0
    else:
        factor = scale
    if MASKED:
        column = gl.arange(0, WIDTH, gl.SliceLayout(0, LOGITS))[None, :]
        logits = gl.where(column <= (newest - key)[:, None], logits, NOTHING)
        if WINDOWED:
            logits = gl.where(column >= (oldest - key)[:, None], logits, NOTHING)
    new_largest = gl.maximum(largest, gl.max(logits, 1) * factor)
    weights = gl.exp2(logits * factor - new_largest[:, None])
    shrink = gl.exp2(largest - new_largest)
    return weights, shrink, new_largest, total * shrink + gl.sum(weights, 1)


@gluon.jit
def _bits(weights, dtype: gl.constexpr, WEIGHTS: gl.constexpr):
    """Weights for ``_add_values``, as int16: of bfloat16 that is carried to the next step, the compiler swaps
    the halves of each register, and there back again (64 instructions of 535)."""
    return gl.convert_layout(weights.to(dtype), WEIGHTS).to(gl.int16, bitcast=True)


@gluon.jit
def _add_values(weights, values, stage, acc):
    """Starts acc + weights V for a step."""
    weights = weights.to(values.dtype, bitcast=True)
    return warpgroup_mma(weights, values.index(stage), acc, is_async=True)


@gluon.jit
def _my_turn(turns, step, GROUP: gl.constexpr):
    """Waits until the other group has started its products."""
    mbarrier.wait(turns.index(GROUP), (step & 1) ^ (1 - GROUP))


@gluon.jit
def _step(
    rows, exists, acc, weights, largest, total, keys, values, k_full, k_empty, v_full, v_empty,
    turns, step, key, newest, oldest, scale, cap,
    MASKED: gl.constexpr, SOFTCAP: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    WINDOWED: gl.constexpr, LOGITS: gl.constexpr, WEIGHTS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Adds the values of the step before, and computes the weights of its own.

    Args:
        exists: whether there are keys, or stale ones do: in the step behind a program's last unit.
        key: position of the first key.

    There is no branch while products are in flight, because the assembler waits for all of them where two
    paths meet. So whether keys are masked is decided outside.
    """
    old_stage = step % STAGES
    old_phase = (step // STAGES) & 1
    step += 1
    stage = step % STAGES
    mbarrier.wait(v_full.index(old_stage), old_phase)
    mbarrier.wait(k_full.index(stage), (step // STAGES) & 1, pred=exists)
    _my_turn(turns, step, GROUP)
    logits = _logits(rows, keys, stage, LOGITS, WIDTH)
    acc = _add_values(weights, values, old_stage, acc)
    mbarrier.arrive(turns.index(1 - GROUP), count=1)
    logits = warpgroup_mma_wait(1, deps=[logits])
    mbarrier.arrive(k_empty.index(stage), count=1)
    logits, shrink, largest, total = _weigh(
        logits, largest, total, key, newest, oldest, scale, cap, MASKED, SOFTCAP, WIDTH, WINDOWED, LOGITS
    )
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(old_stage), count=1)
    return acc, _bits(logits, values.dtype, WEIGHTS), shrink, largest, total, step


@gluon.jit
def _attend(
    rows, acc, weights, largest, total, keys, values, k_full, k_empty, v_full, v_empty,
    turns, step, key, num_steps, newest, oldest, scale, cap,
    MASKED: gl.constexpr, SOFTCAP: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    WINDOWED: gl.constexpr, LOGITS: gl.constexpr, OUTPUT: gl.constexpr, WEIGHTS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """``num_steps`` steps of a unit, before ``key``."""
    for _ in range(num_steps):
        key -= WIDTH
        acc, weights, shrink, largest, total, step = _step(
            rows, True, acc, weights, largest, total, keys, values, k_full, k_empty, v_full, v_empty,
            turns, step, key, newest, oldest, scale, cap,
            MASKED, SOFTCAP, WIDTH, STAGES, WINDOWED, LOGITS, WEIGHTS, GROUP,
        )  # fmt: skip
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
    return acc, weights, largest, total, step, key


@gluon.jit
def _anew(x):
    """x, of which the compiler does not know that it is the same in each turn of a loop, or in two places.

    What it computed only once would take the accumulators' registers: it would wait in local memory, for
    which the first-level cache has no room beside so much shared memory.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _places(row, group, inverse, stride, HEAD_DIM: gl.constexpr):
    """Where rows of a tile lie behind its first one, in elements: a token's query heads, then the next's."""
    return ((row * _anew(inverse)) >> 16) * (stride - group * HEAD_DIM) + row * HEAD_DIM


@gluon.jit
def _copy_rows(
    q, rows, exists, kv_head, first_row, num_tokens, group, inverse, q_stride, FIRST: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, PLAIN: gl.constexpr,
):  # fmt: skip
    """Starts copying a group's rows of q to shared memory; those that do not exist become zero."""
    row = FIRST + gl.arange(0, 64, gl.SliceLayout(1, PLAIN))
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, PLAIN))
    start = q + first_row.to(gl.int64) * q_stride + kv_head * group * HEAD_DIM
    places = _places(row, group, inverse, q_stride, HEAD_DIM)[:, None] + column[None, :]
    mask = (row < gl.where(exists, num_tokens * group, 0))[:, None] & (column < HEAD_DIM)[None, :]
    async_copy.async_copy_global_to_shared(rows, start + places, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _wait_for_rows():
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _visible(
    low, num_tokens, window, inverse, FIRST: gl.constexpr, WINDOWED: gl.constexpr, LOGITS: gl.constexpr
):  # fmt: skip
    """Positions of the newest and the oldest key that each row of a group sees."""
    row = FIRST + gl.arange(0, 64, gl.SliceLayout(1, LOGITS))
    newest = low + gl.minimum((row * inverse) >> 16, num_tokens - 1)
    oldest = newest
    if WINDOWED:
        oldest = newest - window + 1
    return newest, oldest


@gluon.jit
def _finish(
    acc, largest, total, staging, out, sinks, has_sinks, v_scale, kv_head, first_row, num_tokens, group,
    inverse, out_stride, FIRST: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr,
    LOGITS: gl.constexpr, OUTPUT: gl.constexpr, PLAIN: gl.constexpr,
):  # fmt: skip
    """Divides by the sum of weights, and stores a group's rows."""
    row = FIRST + gl.arange(0, 64, gl.SliceLayout(1, LOGITS))
    token = (row * inverse) >> 16
    head = kv_head * group + row - token * group
    sink = gl.load(sinks + head, mask=(row < num_tokens * group) & (has_sinks != 0), other=NOTHING)
    sink = gl.maximum(sink * 1.4426950408889634, NOTHING)
    top = gl.maximum(largest, sink)
    shrink = gl.exp2(largest - top)
    factor = shrink * v_scale / (total * shrink + gl.exp2(sink - top))
    acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))[:, None]
    staging.store(acc.to(staging.dtype))
    gl.thread_barrier()
    result = staging.load(PLAIN)
    row = FIRST + gl.arange(0, 64, gl.SliceLayout(1, PLAIN))
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, PLAIN))
    start = out + first_row.to(gl.int64) * out_stride + kv_head * group * HEAD_DIM
    places = _places(row, group, inverse, out_stride, HEAD_DIM)[:, None] + column[None, :]
    mask = (row < num_tokens * group)[:, None] & (column < HEAD_DIM)[None, :]
    gl.store(start + places, result, mask=mask)
    gl.thread_barrier()  # before the next rows are copied to where these were


@gluon.jit
def _compute(
    q, out, queries, keys, values, k_full, k_empty, v_full, v_empty, turns, tiles, sinks, scale, cap, v_scale,
    has_sinks, window, group, num_tiles, num_kv_heads, q_stride, out_stride,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    SOFTCAP: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    """Four warps that compute rows 64 * GROUP to 64 * GROUP + 63 of each tile."""
    FIRST: gl.constexpr = 64 * GROUP
    WIDTH: gl.constexpr = STEP_BLOCKS * BLOCK_SIZE
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    # row // group is (row * inverse) >> 16, for rows below 128 and groups up to 16.
    inverse = (65535 + group) // group
    kv_inverse = _inverse(num_kv_heads)
    num_units = num_tiles * num_kv_heads
    sequence, first_row, num_tokens, low = _record(0, tiles, num_units, kv_inverse, num_kv_heads)
    next_sequence, next_first_row, next_num_tokens, next_low = _record(
        1, tiles, num_units, kv_inverse, num_kv_heads
    )
    exists = sequence >= 0
    _tile, kv_head = _split(_index(0), kv_inverse, num_kv_heads)
    turn = 0
    step = 0
    # In this order, as in ``rope_cache``.
    gdc_wait()
    gdc_launch_dependents()
    _copy_rows(
        q, queries.index(GROUP), exists, kv_head, first_row, num_tokens, group, inverse, q_stride,
        FIRST, HEAD_DIM, BLOCK_D, PLAIN,
    )  # fmt: skip
    _wait_for_rows()
    # The first step of the first unit, which is at the diagonal; those of other units are below.
    first, _count, num_steps = _steps(low, num_tokens, window, BLOCK_SIZE, WINDOWED)
    key = first * BLOCK_SIZE + (num_steps - 1) * WIDTH
    newest, oldest = _visible(low, num_tokens, window, inverse, FIRST, WINDOWED, LOGITS)
    largest = gl.full([64], NOTHING, gl.float32, gl.SliceLayout(1, LOGITS))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, LOGITS))
    acc = gl.zeros([64, BLOCK_D], gl.float32, OUTPUT)
    mbarrier.wait(k_full.index(0), 0, pred=exists)
    _my_turn(turns, step, GROUP)
    logits = _logits(queries.index(GROUP), keys, 0, LOGITS, WIDTH)
    mbarrier.arrive(turns.index(1 - GROUP), count=1)
    logits = warpgroup_mma_wait(0, deps=[logits])
    mbarrier.arrive(k_empty.index(0), count=1)
    logits, _shrink, largest, total = _weigh(
        logits, largest, total, key, newest, oldest, scale, cap, True, SOFTCAP, WIDTH, WINDOWED, LOGITS
    )
    weights = _bits(logits, values.dtype, WEIGHTS)
    while exists:
        inverse = _anew(inverse)
        group = _anew(group)
        # Used a unit later, when it is there.
        after_sequence, after_first_row, after_num_tokens, after_low = _record(
            turn + 2, tiles, num_units, kv_inverse, num_kv_heads
        )
        rows = queries.index((turn & 1) * 2 + GROUP)
        next_rows = queries.index(2 - (turn & 1) * 2 + GROUP)
        next_index = _index(turn + 1)
        next_exists = (next_index < num_units) & (next_sequence >= 0)
        _tile, next_kv_head = _split(next_index, kv_inverse, num_kv_heads)
        _copy_rows(
            q, next_rows, next_exists, next_kv_head, next_first_row, next_num_tokens, group, inverse,
            q_stride, FIRST, HEAD_DIM, BLOCK_D, PLAIN,
        )  # fmt: skip

        # Steps [0, seen) cut the window, [seen, diagonal) are visible to all rows, the rest is the diagonal.
        rest = num_steps - 1
        start = key - rest * WIDTH
        seen = 0
        if WINDOWED:
            seen = gl.minimum(gl.cdiv(gl.maximum(low + num_tokens - window - start, 0), WIDTH), rest)
        diagonal = gl.minimum(gl.maximum((low + 1 - start) // WIDTH, seen), rest)
        acc, weights, largest, total, step, key = _attend(
            rows, acc, weights, largest, total, keys, values, k_full, k_empty, v_full, v_empty,
            turns, step, key, rest - diagonal, newest, oldest, scale, cap,
            True, SOFTCAP, WIDTH, STAGES, WINDOWED, LOGITS, OUTPUT, WEIGHTS, GROUP,
        )  # fmt: skip
        acc, weights, largest, total, step, key = _attend(
            rows, acc, weights, largest, total, keys, values, k_full, k_empty, v_full, v_empty,
            turns, step, key, diagonal - seen, newest, oldest, scale, cap,
            False, SOFTCAP, WIDTH, STAGES, WINDOWED, LOGITS, OUTPUT, WEIGHTS, GROUP,
        )  # fmt: skip
        if WINDOWED:
            acc, weights, largest, total, step, key = _attend(
                rows, acc, weights, largest, total, keys, values, k_full, k_empty, v_full, v_empty,
                turns, step, key, seen, newest, oldest, scale, cap,
                True, SOFTCAP, WIDTH, STAGES, WINDOWED, LOGITS, OUTPUT, WEIGHTS, GROUP,
            )  # fmt: skip

        # The values of the last step, and the first logits of the next unit.
        next_first, _count, next_num_steps = _steps(next_low, next_num_tokens, window, BLOCK_SIZE, WINDOWED)
        key = next_first * BLOCK_SIZE + (next_num_steps - 1) * WIDTH
        newest, oldest = _visible(next_low, next_num_tokens, window, inverse, FIRST, WINDOWED, LOGITS)
        _wait_for_rows()
        old_largest, old_total = largest, total
        largest = gl.full([64], NOTHING, gl.float32, gl.SliceLayout(1, LOGITS))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, LOGITS))
        acc, weights, _shrink, largest, total, step = _step(
            next_rows, next_exists, acc, weights, largest, total, keys, values, k_full, k_empty, v_full,
            v_empty, turns, step, key, newest, oldest, scale, cap,
            True, SOFTCAP, WIDTH, STAGES, WINDOWED, LOGITS, WEIGHTS, GROUP,
        )  # fmt: skip
        _finish(
            acc, old_largest, old_total, rows, out, sinks, has_sinks, v_scale, kv_head, first_row, num_tokens,
            group, inverse, out_stride, FIRST, HEAD_DIM, BLOCK_D, LOGITS, OUTPUT, PLAIN,
        )  # fmt: skip
        acc = gl.zeros([64, BLOCK_D], gl.float32, OUTPUT)
        exists, kv_head, num_steps, turn = next_exists, next_kv_head, next_num_steps, turn + 1
        first_row, num_tokens, low = next_first_row, next_num_tokens, next_low
        next_sequence, next_first_row, next_num_tokens, next_low = (
            after_sequence, after_first_row, after_num_tokens, after_low,
        )  # fmt: skip


@gluon.jit
def _barriers(COUNT: gl.constexpr, READERS: gl.constexpr):
    """Barriers of COUNT buffers, for "full" and for "empty"."""
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty


@gluon.jit
def prefill_hopper(
    q, cache, out, tiles, block_tables, sinks, scale, cap, v_scale, has_sinks, window, group, num_kv_heads,
    q_stride, out_stride, table_stride, num_tiles,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_SIZE: gl.constexpr, ROWS: gl.constexpr,
    SOFTCAP: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as multiprocessors, or units if there are fewer. Arguments as of
    ``prefill_attention``; tiles with sequence -1 are the last. Tiles and block tables are read before the
    launch before has ended.

    cache: tensor map [num_blocks * 2 * num_kv_heads * BLOCK_SIZE, HEAD_DIM], boxes of 64 x 64. ROWS is 128,
    BLOCK_SIZE 64. WINDOWED: rows see the last ``window`` keys only; otherwise ``window`` is not read, which
    saves a comparison for each logit of a masked step.
    """
    # What is copied at once is 64 columns of a block. The boxes of a stage (64 columns of both blocks, then
    # the next 64) lie in memory as one tile of both blocks does.
    PARTS: gl.constexpr = BLOCK_D // cache.block_shape[1]
    box: gl.constexpr = [2 * PARTS * STAGES, BLOCK_SIZE, cache.block_shape[1]]
    tile: gl.constexpr = [STAGES, STEP_BLOCKS * BLOCK_SIZE, BLOCK_D]
    key_boxes = gl.allocate_shared_memory(cache.dtype, box, cache.layout)
    value_boxes = gl.allocate_shared_memory(cache.dtype, box, cache.layout)
    keys = key_boxes._reinterpret(cache.dtype, tile, cache.layout)
    values = value_boxes._reinterpret(cache.dtype, tile, cache.layout)
    # Of this unit and of the next, for both groups; the output passes through them.
    queries = gl.allocate_shared_memory(cache.dtype, [4, 64, BLOCK_D], cache.layout)
    k_full, k_empty = _barriers(STAGES, 2)
    v_full, v_empty = _barriers(STAGES, 2)
    turns, _ = _barriers(2, 1)
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    q, out, queries, keys, values, k_full, k_empty, v_full, v_empty, turns, tiles, sinks,
                    scale, cap, v_scale, has_sinks, window, group, num_tiles, num_kv_heads, q_stride,
                    out_stride, 0, HEAD_DIM, BLOCK_D, BLOCK_SIZE, SOFTCAP, STAGES, WINDOWED,
                ),
            ),
            (
                _compute,
                (
                    q, out, queries, keys, values, k_full, k_empty, v_full, v_empty, turns, tiles, sinks,
                    scale, cap, v_scale, has_sinks, window, group, num_tiles, num_kv_heads, q_stride,
                    out_stride, 1, HEAD_DIM, BLOCK_D, BLOCK_SIZE, SOFTCAP, STAGES, WINDOWED,
                ),
            ),
            (
                _copy,
                (
                    cache, key_boxes, value_boxes, k_full, k_empty, v_full, v_empty, tiles, block_tables,
                    table_stride, num_tiles, num_kv_heads, window, PARTS, BLOCK_SIZE, STAGES, WINDOWED,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
