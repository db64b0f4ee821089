"""``prefill_attention`` for compute capability 9.0, in Gluon: warps that copy beside warps that multiply.

A program lives as long as the launch and takes one unit (a tile and a KV head) after the other. One warp
copies keys and values to shared memory, 128 positions at a time, as far ahead as there is room: into the next
unit too. Two groups of four warps compute 64 rows each: while one has its exponentials, the other multiplies.
The order of a step is that of FlashAttention-3 (arXiv:2407.08608), which would let a group overlap the two by
itself; the assembler waits for the products first in all but the last steps of a unit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engine_runtime.kernels import attention_layout

NOTHING = gl.constexpr(attention_layout.NOTHING)
STEP_BLOCKS = gl.constexpr(2)


@gluon.jit
def _unit(index, tiles, num_units, num_kv_heads):
    """(exists, KV head, sequence, first row, number of tokens, position of the first) of a unit."""
    exists = index < num_units
    tile = gl.where(exists, index // num_kv_heads, 0)
    record = tiles + tile * 4
    sequence = gl.load(record)
    exists = exists & (sequence >= 0)
    return (
        exists,
        index % num_kv_heads,
        sequence,
        gl.load(record + 1),
        gl.load(record + 2),
        gl.load(record + 3),
    )


@gluon.jit
def _index(turn):
    """The unit of this program in a turn. They are sorted by length: every other turn goes backwards."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, place, programs - 1 - place)


@gluon.jit
def _blocks(low, num_tokens, window, BLOCK_SIZE: gl.constexpr):
    """The first block that a tile sees, and how many."""
    first = gl.where(window > 0, gl.maximum(low - window + 1, 0), 0) // BLOCK_SIZE
    return first, gl.cdiv(low + num_tokens, BLOCK_SIZE) - first


@gluon.jit
def _copy(
    cache,
    keys,
    values,
    k_full,
    k_empty,
    v_full,
    v_empty,
    tiles,
    block_tables,
    table_stride,
    num_tiles,
    num_kv_heads,
    window,
    BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The copying warp."""
    num_units = num_tiles * num_kv_heads
    step = 0
    for turn in range(gl.cdiv(num_units, gl.num_programs(0))):
        exists, kv_head, sequence, _, num_tokens, low = _unit(_index(turn), tiles, num_units, num_kv_heads)
        if exists:
            first, count = _blocks(low, num_tokens, window, BLOCK_SIZE)
            table = block_tables + sequence.to(gl.int64) * table_stride + first
            left = gl.load(table)
            right = gl.load(table + gl.minimum(1, count - 1))
            for i in range(0, count, STEP_BLOCKS):
                next_left = gl.load(table + gl.minimum(i + 2, count - 1))
                next_right = gl.load(table + gl.minimum(i + 3, count - 1))
                stage = step % STAGES
                phase = (step // STAGES) & 1
                row_left = (left * 2 * num_kv_heads + kv_head) * BLOCK_SIZE
                row_right = (right * 2 * num_kv_heads + kv_head) * BLOCK_SIZE
                offset = num_kv_heads * BLOCK_SIZE
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
def _logits(q, keys, stage, LOGITS: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """Starts q K^T for the two blocks of a step."""
    zeros = gl.zeros([64, BLOCK_SIZE], gl.float32, LOGITS)
    left = warpgroup_mma(q, keys.index(2 * stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    right = warpgroup_mma(q, keys.index(2 * stage + 1).permute((1, 0)), zeros, use_acc=False, is_async=True)
    return left, right


@gluon.jit
def _add_values(left, right, values, stage, acc):
    """Starts acc + weights V for the two blocks of a step."""
    acc = warpgroup_mma(left, values.index(2 * stage), acc, is_async=True)
    return warpgroup_mma(right, values.index(2 * stage + 1), acc, is_async=True)


@gluon.jit
def _weigh(
    left, right, largest, total, key, position, scale, cap, window,
    MASKED: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_SIZE: gl.constexpr, LOGITS: gl.constexpr,
    OPERAND: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax, for keys at ``key`` and following; see ``attention_tile.weigh``."""
    if SOFTCAP:
        left = cap - 2.0 * cap / (1.0 + gl.exp2(left * scale))
        right = cap - 2.0 * cap / (1.0 + gl.exp2(right * scale))
        factor = 1.0
    else:
        factor = scale
    if MASKED:
        column = key + gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, LOGITS))[None, :]
        row = position[:, None]
        visible = (column <= row) & ((window == 0) | (column > row - window))
        left = gl.where(visible, left, NOTHING)
        column += BLOCK_SIZE
        visible = (column <= row) & ((window == 0) | (column > row - window))
        right = gl.where(visible, right, NOTHING)
    new_largest = gl.maximum(largest, gl.max(gl.maximum(left, right), 1) * factor)
    left = gl.exp2(left * factor - new_largest[:, None])
    right = gl.exp2(right * factor - new_largest[:, None])
    shrink = gl.exp2(largest - new_largest)
    total = total * shrink + gl.sum(left + right, 1)
    left_weights = gl.convert_layout(left.to(DTYPE), OPERAND)
    right_weights = gl.convert_layout(right.to(DTYPE), OPERAND)
    return left_weights, right_weights, shrink, new_largest, total


@gluon.jit
def _attend(
    rows, acc, left_weights, right_weights, largest, total, keys, values, k_full, k_empty, v_full, v_empty,
    step, key, num_steps, position, scale, cap, window,
    MASKED: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
    LOGITS: gl.constexpr, OUTPUT: gl.constexpr, OPERAND: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """``num_steps`` steps: each adds the values of the step before, and computes the weights of its own.

    There is no branch while products are in flight, because the assembler waits for all of them where two
    paths meet. So whether keys are masked is decided outside.
    """
    for _ in range(num_steps):
        old_stage = step % STAGES
        old_phase = (step // STAGES) & 1
        step += 1
        key += STEP_BLOCKS * BLOCK_SIZE
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        left, right = _logits(rows, keys, stage, LOGITS, BLOCK_SIZE)
        mbarrier.wait(v_full.index(old_stage), old_phase)
        acc = _add_values(left_weights, right_weights, values, old_stage, acc)
        left, right = warpgroup_mma_wait(2, deps=[left, right])
        mbarrier.arrive(k_empty.index(stage), count=1)
        new_left, new_right, shrink, largest, total = _weigh(
            left, right, largest, total, key, position, scale, cap, window,
            MASKED, SOFTCAP, BLOCK_SIZE, LOGITS, OPERAND, DTYPE,
        )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(old_stage), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
        left_weights, right_weights = new_left, new_right
    return acc, left_weights, right_weights, largest, total, step, key


@gluon.jit
def _load_rows(
    q, exists, kv_head, first_row, num_tokens, group, q_stride, FIRST: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, PLAIN: gl.constexpr,
):  # fmt: skip
    row = FIRST + gl.arange(0, 64, gl.SliceLayout(1, PLAIN))
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, PLAIN))
    is_row = (row < num_tokens * group) & exists
    token = gl.minimum(row // group, num_tokens - 1)
    head = kv_head * group + row % group
    place = (first_row + token).to(gl.int64) * q_stride + head * HEAD_DIM
    mask = is_row[:, None] & (column < HEAD_DIM)[None, :]
    return gl.load(q + place[:, None] + column[None, :], mask=mask, other=0.0)


@gluon.jit
def _compute(
    q,
    out,
    keys,
    values,
    k_full,
    k_empty,
    v_full,
    v_empty,
    tiles,
    sinks,
    scale,
    cap,
    v_scale,
    has_sinks,
    window,
    group,
    num_tiles,
    num_kv_heads,
    q_stride,
    out_stride,
    FIRST: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Four warps that compute rows FIRST to FIRST + 63 of each tile."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, LOGITS, 2)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    num_units = num_tiles * num_kv_heads
    step = 0
    exists, kv_head, _sequence, first_row, num_tokens, low = _unit(_index(0), tiles, num_units, num_kv_heads)
    plain = _load_rows(
        q, exists, kv_head, first_row, num_tokens, group, q_stride, FIRST, HEAD_DIM, BLOCK_D, PLAIN
    )
    for turn in range(gl.cdiv(num_units, gl.num_programs(0))):
        next_exists, next_kv_head, _sequence, next_first_row, next_num_tokens, next_low = _unit(
            _index(turn + 1), tiles, num_units, num_kv_heads
        )
        row = FIRST + gl.arange(0, 64, gl.SliceLayout(1, LOGITS))
        position = low + gl.minimum(row // group, num_tokens - 1)
        largest = gl.full([64], NOTHING, gl.float32, gl.SliceLayout(1, LOGITS))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, LOGITS))
        acc = gl.zeros([64, BLOCK_D], gl.float32, OUTPUT)
        rows = gl.convert_layout(plain, QUERIES)
        first, count = _blocks(low, num_tokens, window, BLOCK_SIZE)
        key = first * BLOCK_SIZE
        num_steps = gl.where(exists, gl.cdiv(count, STEP_BLOCKS), 0)
        if num_steps > 0:
            stage = step % STAGES
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
            left, right = _logits(rows, keys, stage, LOGITS, BLOCK_SIZE)
            left, right = warpgroup_mma_wait(0, deps=[left, right])
            mbarrier.arrive(k_empty.index(stage), count=1)
            left_weights, right_weights, _shrink, largest, total = _weigh(
                left, right, largest, total, key, position, scale, cap, window,
                True, SOFTCAP, BLOCK_SIZE, LOGITS, WEIGHTS, DTYPE,
            )  # fmt: skip
            # Steps [1, seen) cut the window, [seen, diagonal) are visible to all rows, the rest are diagonal.
            width: gl.constexpr = STEP_BLOCKS * BLOCK_SIZE
            hidden = gl.maximum(low + num_tokens - window - key, 0)
            seen = gl.where(window > 0, gl.cdiv(hidden, width), 0)
            seen = gl.maximum(gl.minimum(seen, num_steps), 1)
            diagonal = gl.maximum((low + 1 - key) // width, seen)
            acc, left_weights, right_weights, largest, total, step, key = _attend(
                rows, acc, left_weights, right_weights, largest, total, keys, values, k_full, k_empty, v_full,
                v_empty, step, key, seen - 1, position, scale, cap, window,
                True, SOFTCAP, BLOCK_SIZE, STAGES, LOGITS, OUTPUT, WEIGHTS, DTYPE,
            )  # fmt: skip
            acc, left_weights, right_weights, largest, total, step, key = _attend(
                rows, acc, left_weights, right_weights, largest, total, keys, values, k_full, k_empty, v_full,
                v_empty, step, key, diagonal - seen, position, scale, cap, window,
                False, SOFTCAP, BLOCK_SIZE, STAGES, LOGITS, OUTPUT, WEIGHTS, DTYPE,
            )  # fmt: skip
            acc, left_weights, right_weights, largest, total, step, key = _attend(
                rows, acc, left_weights, right_weights, largest, total, keys, values, k_full, k_empty, v_full,
                v_empty, step, key, num_steps - diagonal, position, scale, cap, window,
                True, SOFTCAP, BLOCK_SIZE, STAGES, LOGITS, OUTPUT, WEIGHTS, DTYPE,
            )  # fmt: skip
            stage = step % STAGES
            mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
            acc = _add_values(left_weights, right_weights, values, stage, acc)
            plain = _load_rows(
                q, next_exists, next_kv_head, next_first_row, next_num_tokens, group, q_stride, FIRST,
                HEAD_DIM, BLOCK_D, PLAIN,
            )  # fmt: skip
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(stage), count=1)
            step += 1

            is_row = row < num_tokens * group
            sink_of_row = sinks + kv_head * group + row % group
            sink = gl.load(sink_of_row, mask=is_row & (has_sinks != 0), other=NOTHING)
            sink = gl.maximum(sink * 1.4426950408889634, NOTHING)
            top = gl.maximum(largest, sink)
            shrink_all = gl.exp2(largest - top)
            total = total * shrink_all + gl.exp2(sink - top)
            factor = gl.convert_layout(shrink_all * v_scale / total, gl.SliceLayout(1, OUTPUT))
            result = gl.convert_layout((acc * factor[:, None]).to(DTYPE), PLAIN)
            out_row = FIRST + gl.arange(0, 64, gl.SliceLayout(1, PLAIN))
            column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, PLAIN))
            head = kv_head * group + out_row % group
            place = (first_row + out_row // group).to(gl.int64) * out_stride + head * HEAD_DIM
            mask = (out_row < num_tokens * group)[:, None] & (column < HEAD_DIM)[None, :]
            gl.store(out + place[:, None] + column[None, :], result, mask=mask)
        exists, kv_head, first_row, num_tokens, low = (
            next_exists,
            next_kv_head,
            next_first_row,
            next_num_tokens,
            next_low,
        )


@gluon.jit
def prefill_hopper(
    q,
    cache,
    out,
    tiles,
    block_tables,
    sinks,
    scale,
    cap,
    v_scale,
    has_sinks,
    window,
    group,
    num_kv_heads,
    q_stride,
    out_stride,
    table_stride,
    num_tiles,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    ROWS: gl.constexpr,
    SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid: as many programs as multiprocessors. Arguments as of ``prefill_attention``.

    cache: tensor map [num_blocks * 2 * num_kv_heads * BLOCK_SIZE, HEAD_DIM]. ROWS is 128, BLOCK_SIZE 64.
    """
    keys = gl.allocate_shared_memory(cache.dtype, [2 * STAGES, BLOCK_SIZE, BLOCK_D], cache.layout)
    values = gl.allocate_shared_memory(cache.dtype, [2 * STAGES, BLOCK_SIZE, BLOCK_D], cache.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    q, out, keys, values, k_full, k_empty, v_full, v_empty, tiles, sinks, scale, cap, v_scale,
                    has_sinks, window, group, num_tiles, num_kv_heads, q_stride, out_stride,
                    0, HEAD_DIM, BLOCK_D, BLOCK_SIZE, SOFTCAP, STAGES,
                ),
            ),
            (
                _compute,
                (
                    q, out, keys, values, k_full, k_empty, v_full, v_empty, tiles, sinks, scale, cap, v_scale,
                    has_sinks, window, group, num_tiles, num_kv_heads, q_stride, out_stride,
                    64, HEAD_DIM, BLOCK_D, BLOCK_SIZE, SOFTCAP, STAGES,
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
