"""The GPU's attention kernels on a CPU; tests/gpu/test_attention.py runs more and larger cases on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from engine_runtime.kernels.attention_layout import BLOCK_SIZE, HALVES_OF_PAIRS, NOTHING, PLAN
from engine_runtime.kernels.gpu_attention import AttentionShape, DecodeBatch, PagedAttention
from engine_runtime.kernels.widened_cache import Widening
from tests.engine_runtime.kernels.attention_cases import (
    AttentionCase,
    Sequence,
    make_attention,
    random_case,
)
from tests.engine_runtime.kernels.interpreter_process import (
    check_interpreted,
    in_the_interpreter,
    starts_the_interpreter,
)


@starts_the_interpreter
def test_kernels_in_the_interpreter() -> None:
    check_interpreted(__file__)


class Untouched:
    """A library whose kernels are asked for their constants only."""

    def __contains__(self, name: str) -> bool:
        return True

    def get(self, name: str) -> Any:
        class Kernel:
            constexprs = {"ROWS": 128, "HEADS": 8, "BLOCK_D": 128, "STEP": 64, "COMBINED": 2048}  # noqa: RUF012

        return Kernel()


class Recorder(Untouched):
    """Whose launches are written down: name, grid, arguments; and which of them started early."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[int, int, int], tuple[Any, ...]]] = []
        self.early: list[bool] = []

    def get(self, name: str) -> Any:
        kernel = super().get(name)

        def launch(is_early: bool, grid: tuple[int, int, int], stream: Any, *args: Any) -> None:
            self.launches.append((name, grid, args))
            self.early.append(is_early)

        kernel.launch, kernel.launch_early = partial(launch, False), partial(launch, True)
        kernel.tensor_map = lambda argument, address, *sizes: (f"map of {name}", address)
        return kernel


def attention(num_widened_blocks: int = 0, library: Any = None, **changes: Any) -> PagedAttention:
    values: dict[str, Any] = {
        "num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
        "dtype": "bf16", "kv_dtype": "same", "scale": 1.0,
    }  # fmt: skip
    library = library or Untouched()
    return PagedAttention(
        library, AttentionShape(**(values | changes)), max_sequences=256, num_multiprocessors=132,
        num_widened_blocks=num_widened_blocks,
    )  # fmt: skip


def test_tiles_cover_each_token_once_and_start_with_the_longest() -> None:
    query_start = np.array([0, 1, 2, 2, 102, 135, 136], np.int32)
    context_len = np.array([9, 7, 0, 100, 533, 1000], np.int32)
    tiles = attention().prefill_tiles(query_start, context_len, 2)
    covered = []
    for sequence, row, count, position in tiles.tolist():
        assert 1 <= count <= 32
        covered += [(sequence, row + token, position + token) for token in range(count)]
    expected = [
        (sequence, row, int(context_len[sequence] - query_start[sequence + 1] + row))
        for sequence in range(2, 6)
        for row in range(query_start[sequence], query_start[sequence + 1])
    ]
    assert sorted(covered) == expected
    assert (np.diff(tiles[:, 3]) <= 0).all()
    assert len(tiles) <= attention().max_prefill_tiles(134, 4)
    assert attention().prefill_tiles(query_start[:3], context_len[:2], 2).shape == (0, 4)


def test_contexts_are_widened_where_they_fit_and_many_queries_read_them() -> None:
    def starts(contexts: list[int], counts: list[int], first: int = 1, **changes: Any) -> list[int]:
        query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        made = attention(**({"num_widened_blocks": 40, "kv_dtype": "fp8"} | changes))
        return made.widened_starts(query_start, np.array(contexts, np.int32), first).tolist()

    long = 5000  # a decode, which comes first and is not asked about
    assert starts([long, 300, 1, 64, 2000], [1, 200, 1, 64, 900]) == [0, 5, 6, 7]
    assert starts([long, 40 * 64], [1, 200]) == [0]
    assert starts([long, 40 * 64 + 1], [1, 200]) == []  # too long
    assert starts([long, 2000, 100], [1, 63, 50]) == []  # too few queries
    assert starts([long, 2000, 200], [1, 63, 80]) == [0, 32]
    assert starts([long], [1]) == []
    assert starts([0, 0], [1, 30]) == []  # padding
    assert starts([long, 300], [1, 300], kv_dtype="same") == []
    few = attention(kv_dtype="fp8").widened_starts(np.array([0, 9], np.int32), np.array([9], np.int32))
    assert few.tolist() == []


@pytest.mark.parametrize("kv_dtype", ["same", "fp8"])
@pytest.mark.parametrize("is_widened", [False, True])
@pytest.mark.parametrize("window", [None, 50])
def test_prompts_read_the_widened_contexts_or_the_cache(
    window: int | None, is_widened: bool, kv_dtype: str
) -> None:
    hopper = "prefill_hopper_bf16_d128" + ("_window" if window else "")
    library, stream = Recorder(), SimpleNamespace(fill=lambda *arguments: None)
    made = attention(40, library, kv_dtype=kv_dtype)
    made.use_workspace(1 << 20, stream)  # type: ignore[arg-type]
    layer = made.kv_layer(5, 100)
    widening = Widening(1, 2, 7, 11, 12, 13) if is_widened else None
    made.prefill(stream, 21, 22, layer, 23, 3, 24, 25, window=window, widening=widening)  # type: ignore[arg-type]
    name, _, args = library.launches[-1]
    if kv_dtype == "fp8" and is_widened:
        (widen, grid, widen_args), _ = library.launches
        blocks, tables = widen_args[1:3]
        assert (widen, grid) == ("widen_cache_bf16_fp8_d128", (7, 2, 16))
        assert widen_args == (5, blocks, tables, 11, 12, 13, 24, 1, window or 0, 8, 25, 40)
        assert name == hopper
        assert args[1:3] == ("map of prefill_hopper_bf16_d128", blocks)
        assert args[5] == tables != 24
        assert args[-2:] == (40, 3)
        room = made.workspace_bytes - (blocks - (1 << 20))
        assert room >= 40 * 2 * 8 * BLOCK_SIZE * 128 * 2 + 256 * 40 * 4
        assert library.early == [False, False]  # the tables that it reads at once are just being written
        return
    assert len(library.launches) == 1
    assert library.early == [kv_dtype == "same"]
    if kv_dtype == "fp8":
        assert name == "prefill_attention_bf16_fp8_d128"
        assert (args[1], args[4], args[-1]) == (5, 24, 25)
    else:
        assert name == hopper
        assert args[1:3] == ("map of prefill_hopper_bf16_d128", 5)
        assert (args[5], args[-2]) == (24, 25)


def test_a_launch_starts_early_unless_it_would_read_what_the_one_before_writes() -> None:
    library, stream = Recorder(), SimpleNamespace(fill=lambda *arguments: None)
    made: Any = attention(library=library)
    layer, batch = made.kv_layer(5, 100), DecodeBatch(3, 11, 12, 13, 14)

    def write_rope(num_tokens: int = 3) -> None:
        made.write_rope(stream, 21, num_tokens, layer, 22, 23, 24, 25)

    def decode() -> None:
        made.decode(stream, 21, 22, layer, batch)

    def prefill() -> None:
        made.prefill(stream, 21, 22, layer, 23, 3, 24, 25)

    def early(*launches: Callable[[], None]) -> list[bool]:
        library.early.clear()
        for launch in launches:
            launch()
        return library.early

    def plan() -> None:
        made.plan_decode(stream, batch)

    assert early(plan, write_rope, decode, write_rope, decode) == [False, True, True, True, True]
    assert early(write_rope, plan, decode, decode) == [True, False, False, True]
    assert early(plan, decode, prefill, decode) == [False, False, True, True]
    assert early(lambda: write_rope(64), lambda: write_rope(65)) == [True, False]


def test_the_cache_takes_what_the_scheduler_is_told() -> None:
    assert attention().shape.kv_block_bytes == 2 * 8 * BLOCK_SIZE * 128 * 2
    assert attention(kv_dtype="fp8").shape.kv_block_bytes == 2 * 8 * BLOCK_SIZE * 128


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 72},
        {"num_heads": 32, "num_kv_heads": 5},
        {"num_heads": 64, "num_kv_heads": 2},
        {"head_dim": 64, "softcap": 30.0},
    ],
)
def test_shapes_without_a_kernel_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="GPU kernel"):
        attention(**changes)


def test_more_sequences_than_the_workspace_holds_are_refused() -> None:
    stream: Any = None
    with pytest.raises(ValueError, match="257 sequences, and the workspace is for 256"):
        attention().plan_decode(stream, DecodeBatch(257, 0, 0, 0, 0))


def test_a_key_that_is_not_seen_has_a_logit_that_is_exact_times_any_factor() -> None:
    assert math.frexp(NOTHING)[0] == -0.5
    for factor in np.random.default_rng(0).uniform(1e-3, 10, 100).astype(np.float32).tolist():
        product = Fraction(NOTHING) * Fraction(factor)
        assert product == Fraction(float(np.float32(NOTHING) * np.float32(factor)))


def test_pairs_of_fp8_are_taken_apart() -> None:
    """Runs the instructions of the PTX on all numbers, two at a time."""
    numbers = np.arange(256, dtype=np.uint8)
    first, second = np.meshgrid(numbers, numbers)
    pairs = first.astype(np.uint32) | second.astype(np.uint32) << 8
    registers = {"$2": pairs | pairs[::-1] << 16}
    operations = {"and": np.bitwise_and, "or": np.bitwise_or, "shl": np.left_shift, "shr": np.right_shift}
    for line in HALVES_OF_PAIRS.strip("{}").split(";"):
        name, _, operands = line.strip().partition(".b32 ")
        if name in operations:
            target, left, right = operands.split(", ")
            value = registers[right] if right in registers else np.uint32(int(right, 0))
            registers[target] = operations[name](registers[left], value)

    def exact(numbers: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        values = numbers.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return np.where(np.isnan(values), np.copysign(480, values), values)  # there are none in the cache

    for output, expected in (("$0", first), ("$1", second)):
        halves = registers[output].view(np.float16).astype(np.float32) * 256
        np.testing.assert_array_equal(halves[:, ::2], exact(expected))
        np.testing.assert_array_equal(halves[:, 1::2], exact(expected[::-1]))


def case_of(sequences: list[Sequence], num_decode: int, **changes: Any) -> AttentionCase:
    values: dict[str, Any] = {
        "num_heads": 6, "num_kv_heads": 2, "head_dim": 64,
        "dtype": "fp16", "kv_dtype": "same", "scale": 0.125,
    }  # fmt: skip
    shape = AttentionShape(**(values | changes.pop("shape", {})))
    return AttentionCase(shape, sequences, num_decode, **changes)


@in_the_interpreter
class TestInterpreted:
    def check(self, case: AttentionCase, num_multiprocessors: int = 2, num_plans: int = 1) -> None:
        from engine_runtime.kernels.triton.attention_specs import SPECS
        from tests.engine_runtime.kernels.interpreted_kernels import HostMemory, InterpretedLibrary

        library = InterpretedLibrary(SPECS, 89 if case.shape.kv_dtype == "fp8" else 80)
        attention = make_attention(library, case, num_multiprocessors)
        case.check(attention, HostMemory(), num_plans)

    @pytest.mark.parametrize("is_alone", [0, 1])
    @pytest.mark.parametrize("window", [0, 100])
    def test_plans_cover_each_context_once(self, window: int, is_alone: int) -> None:
        from engine_runtime.kernels.triton.attention_specs import SPECS
        from tests.engine_runtime.kernels.interpreted_kernels import HostMemory, InterpretedLibrary

        memory = HostMemory()
        contexts, counts = np.array([3000, 1, 0, 64, 0, 700], np.int32), np.array([2, 1, 1, 3, 0, 1])
        query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        tiles = np.full((40, 8), -7, np.int32)
        address, step = memory.put(tiles), 64 << is_alone
        InterpretedLibrary(SPECS).get(PLAN).launch(
            (1, 1, 1), memory.stream, memory.put(query_start), memory.put(contexts), address,
            len(contexts), len(tiles), window, 2, 16, step, is_alone, 90, 50, 3,
        )  # fmt: skip
        written = memory.get(address, tiles).tolist()
        used = [tile for tile in written if tile[0] >= 0]
        assert written == used + [[-1, *tile[1:]] for tile in written[len(used) :]]
        covered: dict[int, int] = {}
        for sequence, first, last, split, splits, row, count, context in used:
            assert (row, count, context) == (query_start[sequence], counts[sequence], contexts[sequence])
            assert splits == sum(tile[0] == sequence for tile in used)
            if split == 0:
                oldest = max(context - count - window + 1, 0) if window else 0
                assert first == oldest // BLOCK_SIZE * BLOCK_SIZE
            else:
                assert first == covered[sequence]
                assert first < last
            assert split == splits - 1 or (last - first) % step == 0
            covered[sequence] = last
        assert covered == dict(enumerate(contexts.tolist()))
        assert window or any(tile[4] > 1 for tile in used)

    @pytest.mark.parametrize("window", [0, 90])
    @pytest.mark.parametrize("head_dim", [80, 128])
    def test_contexts_are_widened(self, head_dim: int, window: int) -> None:
        from engine_runtime.kernels.triton.widen_cache import SPECS
        from tests.engine_runtime.kernels.interpreted_kernels import HostMemory, InterpretedLibrary

        memory, rng = HostMemory(), np.random.default_rng(0)
        cache = rng.standard_normal((9, 2, 2, BLOCK_SIZE, head_dim)).astype(ml_dtypes.float8_e4m3fn)
        contexts, counts, starts = [700, 65, 0, 300], [1, 2, 1, 100], [0, 2, 2]
        tables = np.full((4, 6), 2**30, np.int32)
        tables[1, :2], tables[3, :5] = [8, 0], [3, 1, 7, 2, 5]
        widened = np.full((7, *cache.shape[1:]), 77, ml_dtypes.bfloat16)
        widened_tables = np.full((4, 7), -1, np.int32)
        addresses = [memory.put(array) for array in (cache, widened, widened_tables)]
        query_start = np.concatenate([[0], np.cumsum(counts)])
        addresses += [memory.put(np.array(array, np.int32)) for array in (starts, query_start, contexts)]
        kernel = InterpretedLibrary(SPECS, 90).get(f"widen_cache_bf16_fp8_d{head_dim}")
        kernel.launch((5, 3, 4), memory.stream, *addresses, memory.put(tables), 1, window, 2, 6, 7)
        # Row 200 of the last sequence sees no key before 111 through the window: block 0 is left out.
        left_out = 1 if window else 0
        expected = np.full(widened_tables.shape, -1, np.int32)
        expected[1, :2], expected[3, left_out:5] = [0, 1], np.arange(2 + left_out, 7)
        np.testing.assert_array_equal(memory.get(addresses[2], widened_tables), expected)
        want = widened.astype(np.float32)
        for sequence in (1, 3):
            for block in np.flatnonzero(expected[sequence] >= 0):
                want[expected[sequence, block]] = cache[tables[sequence, block]].astype(np.float32)
        np.testing.assert_array_equal(memory.get(addresses[1], widened).astype(np.float32), want)

    @pytest.mark.parametrize("num_multiprocessors", [1, 16])  # for many sequences, and for few
    def test_decoding_alone_is_split(self, num_multiprocessors: int) -> None:
        self.check(case_of([Sequence(1, 700)], 1), num_multiprocessors, num_plans=2)

    def test_more_rows_than_are_added_up_at_once(self) -> None:
        self.check(case_of([Sequence(2, 321), Sequence(1, 64)], 2), num_plans=2)

    def test_decodes_of_all_lengths_and_padding(self) -> None:
        lengths = [1, 63, 64, 65, 200]
        sequences = [Sequence(1, n) for n in lengths] + [Sequence(1, 0), Sequence(0, 0)]
        self.check(case_of(sequences, len(sequences)))

    def test_chunks_after_cached_prefixes(self) -> None:
        sequences = [Sequence(1, 90), Sequence(70, 70), Sequence(50, 178), Sequence(1, 65)]
        self.check(case_of(sequences, 1))

    @pytest.mark.parametrize("window", [1, 5, 64, 100])
    def test_sliding_windows(self, window: int) -> None:
        sequences = [Sequence(2, 300), Sequence(1, 3), Sequence(100, 240)]
        self.check(case_of(sequences, 2, window=window))

    def test_softcap_and_sinks(self) -> None:
        sequences = [Sequence(1, 150), Sequence(1, 0), Sequence(40, 100)]
        shape = {"head_dim": 128, "softcap": 2.0, "num_heads": 4}
        self.check(case_of(sequences, 2, has_sinks=True, shape=shape, sharpness=4.0))

    def test_heads_that_are_padded(self) -> None:
        self.check(case_of([Sequence(1, 70), Sequence(20, 90)], 1, shape={"head_dim": 80}))

    def test_an_fp8_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from engine_runtime.kernels.triton import attention_tile
        from tests.engine_runtime.kernels.interpreted_kernels import halves_of_pairs

        monkeypatch.setattr(attention_tile, "halves_of_pairs", halves_of_pairs)
        sequences = [Sequence(1, 70), Sequence(2, 300), Sequence(1, 0), Sequence(20, 90)]
        for head_dim in (64, 80):
            shape = {"kv_dtype": "fp8", "head_dim": head_dim}
            # The interpreter does not round up to FP8 correctly where a power of two is passed.
            scales = {"k_scale": 2**-5, "v_scale": 2**-6, "is_exact": True}
            case = case_of(sequences, 3, shape=shape, window=100, **scales)
            self.check(case)

    @pytest.mark.parametrize("seed", range(4))
    def test_random_steps(self, seed: int) -> None:
        fixed = {"dtype": "fp16", "kv_dtype": "same", "longest": 300, "max_decodes": 4, "max_prefills": 3}
        self.check(random_case(seed, **fixed))
