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
def _record(turn, tiles, num_units, num_kv_heads):
    """(sequence, first row, number of tokens, position of the first) of this program's unit in a turn."""
    record = tiles + gl.minimum(_index(turn), num_units - 1) // num_kv_heads * 4
    return gl.load(record), gl.load(record + 1), gl.load(record + 2), gl.load(record + 3)


@gluon.jit
def _steps(low, num_tokens, window, BLOCK_SIZE: gl.constexpr):
    """The first block that a tile sees, how many, and in how many steps."""
    first = gl.where(window > 0, gl.maximum(low - window + 1, 0), 0) // BLOCK_SIZE
    count = gl.cdiv(low + num_tokens, BLOCK_SIZE) - first
    return first, count, gl.cdiv(count, STEP_BLOCKS)


@gluon.jit
def _copy(
    cache, keys, values, k_full, k_empty, v_full, v_empty, tiles, block_tables, table_stride, num_tiles,
    num_kv_heads, window, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    num_units = num_tiles * num_kv_heads
    offset = num_kv_heads * BLOCK_SIZE
    step = 0
    for turn in range(gl.cdiv(num_units, gl.num_programs(0))):
        sequence, _row, num_tokens, low = _record(turn, tiles, num_units, num_kv_heads)
        if (_index(turn) < num_units) & (sequence >= 0):
            kv_head = _index(turn) % num_kv_heads
            first, count, num_steps = _steps(low, num_tokens, window, BLOCK_SIZE)
            table = block_tables + sequence.to(gl.int64) * table_stride + first
            block = STEP_BLOCKS * (num_steps - 1)
            left = gl.load(table + block)
            right = gl.load(table + gl.minimum(block + 1, count - 1))
            for _ in range(num_steps):
                block = gl.maximum(block - STEP_BLOCKS, 0)
                next_left = gl.load(table + block)
                next_right = gl.load(table + gl.minimum(block + 1, count - 1))
                stage = step % STAGES
                phase = (step // STAGES) & 1
                row_left = (left * 2 * num_kv_heads + kv_head) * BLOCK_SIZE
                row_right = (right * 2 * num_kv_heads + kv_head) * BLOCK_SIZE
                mbarrier.wait(k_empty.index(stage), phase ^ 1)
                ready = k_full.index(stage)
                mbarrier.expect(ready, 2 * cache.block_type.nbytes)
                tma.async_copy_global_to_shared(cache, [row_left, 0], ready, keys.index(2 * stage))
                tma.async_copy_global_to_shared(cache, [row_right, 0], ready, keys.index(2 * stage + 1))
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                ready = v_full.index(stage)
                mbarrier.expect(ready, 2 * cache.block_type.nbytes)
                tma.async_copy_global_to_shared(cache, [row_left + offset, 0], ready, values.index(2 * stage))
                tma.async_copy_global_to_shared(
                    cache, [row_right + offset, 0], ready, values.index(2 * stage + 1)
                )
                left, right = next_left, next_right
                step += 1


@gluon.jit
def _logits(rows, keys, stage, LOGITS: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """Starts q K^T for the two blocks of a step."""
    zeros = gl.zeros([64, BLOCK_SIZE], gl.float32, LOGITS)
    left = warpgroup_mma(rows, keys.index(2 * stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    right = warpgroup_mma(
        rows, keys.index(2 * stage + 1).permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    return left, right


@gluon.jit
def _add_values(left, right, values, stage, acc):
    """Starts acc + weights V for the two blocks of a step."""
    acc = warpgroup_mma(left, values.index(2 * stage), acc, is_async=True)
    return warpgroup_mma(right, values.index(2 * stage + 1), acc, is_async=True)


@gluon.jit
def _weigh(
    left, right, largest, total, key, newest, oldest, scale, cap,
    MASKED: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_SIZE: gl.constexpr, LOGITS: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax, for keys at ``key`` and following; see ``attention_tile.weigh``.

    newest, oldest: int32 [64], positions of the keys that each row sees.
    """
    if SOFTCAP:
        left = cap - 2.0 * cap / (1.0 + gl.exp2(left * scale))
        right = cap - 2.0 * cap / (1.0 + gl.exp2(right * scale))
        factor = 1.0
    else:
        factor = scale
    if MASKED:
        column = key + gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, LOGITS))[None, :]
        left = gl.where((column <= newest[:, None]) & (column >= oldest[:, None]), left, NOTHING)
        column += BLOCK_SIZE
        right = gl.where((column <= newest[:, None]) & (column >= oldest[:, None]), right, NOTHING)
    new_largest = gl.maximum(largest, gl.max(gl.maximum(left, right), 1) * factor)
    left = gl.exp2(left * factor - new_largest[:, None])
    right = gl.exp2(right * factor - new_largest[:, None])
    shrink = gl.exp2(largest - new_largest)
    return left, right, shrink, new_largest, total * shrink + gl.sum(left + right, 1)


@gluon.jit
def _my_turn(turns, step, GROUP: gl.constexpr):
    """Waits until the other group has started its products."""
    mbarrier.wait(turns.index(GROUP), (step & 1) ^ (1 - GROUP))


@gluon.jit
def _attend(
    rows, acc, left_weights, right_weights, largest, total, keys, values, k_full, k_empty, v_full, v_empty,
    turns, step, key, num_steps, newest, oldest, scale, cap,
    MASKED: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
    LOGITS: gl.constexpr, OUTPUT: gl.constexpr, WEIGHTS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """``num_steps`` steps: each adds the values of the step before, and computes the weights of its own.

    There is no branch while products are in flight, because the assembler waits for all of them where two
    paths meet. So whether keys are masked is decided outside.
    """
    for _ in range(num_steps):
        old_stage = step % STAGES
        old_phase = (step // STAGES) & 1
        step += 1
        key -= STEP_BLOCKS * BLOCK_SIZE
        stage = step % STAGES
        mbarrier.wait(v_full.index(old_stage), old_phase)
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        _my_turn(turns, step, GROUP)
        left, right = _logits(rows, keys, stage, LOGITS, BLOCK_SIZE)
        acc = _add_values(left_weights, right_weights, values, old_stage, acc)
        mbarrier.arrive(turns.index(1 - GROUP), count=1)
        left, right = warpgroup_mma_wait(2, deps=[left, right])
        mbarrier.arrive(k_empty.index(stage), count=1)
        left, right, shrink, largest, total = _weigh(
            left, right, largest, total, key, newest, oldest, scale, cap, MASKED, SOFTCAP, BLOCK_SIZE, LOGITS
        )
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(old_stage), count=1)
        left_weights = gl.convert_layout(left.to(values.dtype), WEIGHTS)
        right_weights = gl.convert_layout(right.to(values.dtype), WEIGHTS)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
    return acc, left_weights, right_weights, largest, total, step, key


@gluon.jit
def _copy_rows(
    q, rows, exists, kv_head, first_row, num_tokens, group, inverse, q_stride, FIRST: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, PLAIN: gl.constexpr,
):  # fmt: skip
    """Starts copying a group's rows of q to shared memory; those that do not exist become zero."""
    row = FIRST + gl.arange(0, 64, gl.SliceLayout(1, PLAIN))
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, PLAIN))
    token = (row * inverse) >> 16
    head = kv_head * group + row - token * group
    place = (first_row + token).to(gl.int64) * q_stride + head * HEAD_DIM
    mask = ((row < num_tokens * group) & exists)[:, None] & (column < HEAD_DIM)[None, :]
    async_copy.async_copy_global_to_shared(rows, q + place[:, None] + column[None, :], mask=mask)
    async_copy.commit_group()


@gluon.jit
def _wait_for_rows():
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _visible(low, num_tokens, window, inverse, FIRST: gl.constexpr, LOGITS: gl.constexpr):
    """Positions of the newest and the oldest key that each row of a group sees."""
    row = FIRST + gl.arange(0, 64, gl.SliceLayout(1, LOGITS))
    newest = low + gl.minimum((row * inverse) >> 16, num_tokens - 1)
    return newest, gl.where(window > 0, newest - window + 1, 0)


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
    token = (row * inverse) >> 16
    head = kv_head * group + row - token * group
    place = (first_row + token).to(gl.int64) * out_stride + head * HEAD_DIM
    mask = (row < num_tokens * group)[:, None] & (column < HEAD_DIM)[None, :]
    gl.store(out + place[:, None] + column[None, :], result, mask=mask)
    gl.thread_barrier()  # before the next rows are copied to where these were


@gluon.jit
def _compute(
    q, out, queries, keys, values, k_full, k_empty, v_full, v_empty, turns, tiles, sinks, scale, cap, v_scale,
    has_sinks, window, group, num_tiles, num_kv_heads, q_stride, out_stride,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps that compute rows 64 * GROUP to 64 * GROUP + 63 of each tile."""
    FIRST: gl.constexpr = 64 * GROUP
    WIDTH: gl.constexpr = STEP_BLOCKS * BLOCK_SIZE
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    # row // group is (row * inverse) >> 16, for rows below 128 and groups up to 16.
    inverse = (65535 + group) // group
    num_units = num_tiles * num_kv_heads
    sequence, first_row, num_tokens, low = _record(0, tiles, num_units, num_kv_heads)
    next_sequence, next_first_row, next_num_tokens, next_low = _record(1, tiles, num_units, num_kv_heads)
    exists = sequence >= 0
    kv_head = _index(0) % num_kv_heads
    turn = 0
    step = 0
    _copy_rows(
        q, queries.index(GROUP), exists, kv_head, first_row, num_tokens, group, inverse, q_stride,
        FIRST, HEAD_DIM, BLOCK_D, PLAIN,
    )  # fmt: skip
    _wait_for_rows()
    # The last step of the first unit, which is at the diagonal; those of other units are below.
    first, _count, num_steps = _steps(low, num_tokens, window, BLOCK_SIZE)
    key = first * BLOCK_SIZE + (num_steps - 1) * WIDTH
    newest, oldest = _visible(low, num_tokens, window, inverse, FIRST, LOGITS)
    largest = gl.full([64], NOTHING, gl.float32, gl.SliceLayout(1, LOGITS))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, LOGITS))
    acc = gl.zeros([64, BLOCK_D], gl.float32, OUTPUT)
    mbarrier.wait(k_full.index(0), 0, pred=exists)
    _my_turn(turns, step, GROUP)
    left, right = _logits(queries.index(GROUP), keys, 0, LOGITS, BLOCK_SIZE)
    mbarrier.arrive(turns.index(1 - GROUP), count=1)
    left, right = warpgroup_mma_wait(0, deps=[left, right])
    mbarrier.arrive(k_empty.index(0), count=1)
    left, right, _shrink, largest, total = _weigh(
        left, right, largest, total, key, newest, oldest, scale, cap, True, SOFTCAP, BLOCK_SIZE, LOGITS
    )
    left_weights = gl.convert_layout(left.to(q.dtype.element_ty), WEIGHTS)
    right_weights = gl.convert_layout(right.to(q.dtype.element_ty), WEIGHTS)
    while exists:
        # Used a unit later, when it is there.
        after_sequence, after_first_row, after_num_tokens, after_low = _record(
            turn + 2, tiles, num_units, num_kv_heads
        )
        rows = queries.index((turn & 1) * 2 + GROUP)
        next_rows = queries.index(2 - (turn & 1) * 2 + GROUP)
        next_index = _index(turn + 1)
        next_exists = (next_index < num_units) & (next_sequence >= 0)
        next_kv_head = next_index % num_kv_heads
        _copy_rows(
            q, next_rows, next_exists, next_kv_head, next_first_row, next_num_tokens, group, inverse,
            q_stride, FIRST, HEAD_DIM, BLOCK_D, PLAIN,
        )  # fmt: skip

        # Steps [0, seen) cut the window, [seen, diagonal) are visible to all rows, the rest is the diagonal.
        rest = num_steps - 1
        start = key - rest * WIDTH
        seen = gl.where(window > 0, gl.cdiv(gl.maximum(low + num_tokens - window - start, 0), WIDTH), 0)
        diagonal = gl.minimum(gl.maximum((low + 1 - start) // WIDTH, seen), rest)
        seen = gl.minimum(seen, rest)
        for part in range(2):
            acc, left_weights, right_weights, largest, total, step, key = _attend(
                rows, acc, left_weights, right_weights, largest, total, keys, values, k_full, k_empty, v_full,
                v_empty, turns, step, key, gl.where(part == 0, rest - diagonal, seen), newest, oldest, scale,
                cap, True, SOFTCAP, BLOCK_SIZE, STAGES, LOGITS, OUTPUT, WEIGHTS, GROUP,
            )  # fmt: skip
            acc, left_weights, right_weights, largest, total, step, key = _attend(
                rows, acc, left_weights, right_weights, largest, total, keys, values, k_full, k_empty, v_full,
                v_empty, turns, step, key, gl.where(part == 0, diagonal - seen, 0), newest, oldest, scale,
                cap, False, SOFTCAP, BLOCK_SIZE, STAGES, LOGITS, OUTPUT, WEIGHTS, GROUP,
            )  # fmt: skip

        # The values of the last step, and the first logits of the next unit; of stale keys, if there is none.
        next_first, _count, next_num_steps = _steps(next_low, next_num_tokens, window, BLOCK_SIZE)
        key = next_first * BLOCK_SIZE + (next_num_steps - 1) * WIDTH
        newest, oldest = _visible(next_low, next_num_tokens, window, inverse, FIRST, LOGITS)
        _wait_for_rows()
        old_stage = step % STAGES
        old_phase = (step // STAGES) & 1
        step += 1
        stage = step % STAGES
        mbarrier.wait(v_full.index(old_stage), old_phase)
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1, pred=next_exists)
        _my_turn(turns, step, GROUP)
        left, right = _logits(next_rows, keys, stage, LOGITS, BLOCK_SIZE)
        acc = _add_values(left_weights, right_weights, values, old_stage, acc)
        mbarrier.arrive(turns.index(1 - GROUP), count=1)
        left, right = warpgroup_mma_wait(2, deps=[left, right])
        mbarrier.arrive(k_empty.index(stage), count=1)
        old_largest, old_total = largest, total
        largest = gl.full([64], NOTHING, gl.float32, gl.SliceLayout(1, LOGITS))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, LOGITS))
        left, right, _shrink, largest, total = _weigh(
            left, right, largest, total, key, newest, oldest, scale, cap, True, SOFTCAP, BLOCK_SIZE, LOGITS
        )
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(old_stage), count=1)
        left_weights = gl.convert_layout(left.to(q.dtype.element_ty), WEIGHTS)
        right_weights = gl.convert_layout(right.to(q.dtype.element_ty), WEIGHTS)
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
    SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as multiprocessors, or units if there are fewer. Arguments as of
    ``prefill_attention``; tiles with sequence -1 are the last.

    cache: tensor map [num_blocks * 2 * num_kv_heads * BLOCK_SIZE, HEAD_DIM]. ROWS is 128, BLOCK_SIZE 64.
    """
    keys = gl.allocate_shared_memory(cache.dtype, [2 * STAGES, BLOCK_SIZE, BLOCK_D], cache.layout)
    values = gl.allocate_shared_memory(cache.dtype, [2 * STAGES, BLOCK_SIZE, BLOCK_D], cache.layout)
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
                    out_stride, 0, HEAD_DIM, BLOCK_D, BLOCK_SIZE, SOFTCAP, STAGES,
                ),
            ),
            (
                _compute,
                (
                    q, out, queries, keys, values, k_full, k_empty, v_full, v_empty, turns, tiles, sinks,
                    scale, cap, v_scale, has_sinks, window, group, num_tiles, num_kv_heads, q_stride,
                    out_stride, 1, HEAD_DIM, BLOCK_D, BLOCK_SIZE, SOFTCAP, STAGES,
                ),
            ),
            (
                _copy,
                (
                    cache, keys, values, k_full, k_empty, v_full, v_empty, tiles, block_tables, table_stride,
                    num_tiles, num_kv_heads, window, BLOCK_SIZE, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
