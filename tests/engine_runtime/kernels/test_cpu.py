"""Paged attention on the CPU. Slots, outputs and table entries not to be read, or left out, are poisoned."""

from __future__ import annotations

import resource
import threading
from typing import Any

import numpy as np
import pytest

from engine_runtime.kernels import reference
from engine_runtime.kernels.cpu import (
    PagedAttention,
    StepLayout,
    allocate_kv_cache,
    kv_block_bytes,
    supports_float16,
)
from tests.engine_runtime.kernels.paged_step import Geometry, Share, World, random_schedule

GEOMETRIES = (
    Geometry(),
    Geometry(block_size=32),
    Geometry(num_heads=4, num_kv_heads=4, head_dim=8, block_size=48),
    Geometry(num_heads=4, num_kv_heads=2, head_dim=40),
    Geometry(num_heads=14, num_kv_heads=2, head_dim=72, block_size=32),
    Geometry(num_heads=30, num_kv_heads=1, head_dim=80),
    Geometry(num_heads=8, num_kv_heads=8, head_dim=120),
    Geometry(num_heads=16, num_kv_heads=2, head_dim=128),
    Geometry(num_heads=4, num_kv_heads=1, head_dim=256),
)
MASKS = (
    {},
    {"sliding_window": 1},
    {"sliding_window": 37},
    {"softcap": 2.0},
    {"softcap": 30.0, "sliding_window": 20, "scale": 1.3},
)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_equals_the_reference(geometry: Geometry, mask: dict[str, float]) -> None:
    world = World(geometry, [1, 16, 17, 75, 131], seed=1, **mask)  # type: ignore[arg-type]
    for actual, expected in zip(world.whole(), world.reference(), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5 if mask else 5e-6)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_float16_cache_only_rounds_keys_and_values(geometry: Geometry) -> None:
    world = World(geometry, [1, 16, 17, 75, 131], seed=1, dtype=np.float16)
    for actual, expected in zip(world.whole(), world.reference(), strict=True):
        # A key that float32 and float64 round differently is off by 2**-11 of itself.
        np.testing.assert_allclose(actual, expected, atol=2e-3)
        assert np.abs(actual - expected).mean() < 5e-6


@pytest.mark.parametrize("window", [None, 700])
def test_equals_the_reference_over_several_chunks_of_keys(window: int | None) -> None:
    world = World(Geometry(num_heads=2, num_kv_heads=1, head_dim=16), [1100], seed=2, sliding_window=window)
    np.testing.assert_allclose(world.whole()[0], world.reference()[0], atol=5e-6)


def test_rising_scores_move_the_maximum_in_every_chunk() -> None:
    world = World(Geometry(num_heads=1, num_kv_heads=1, head_dim=8), [1600], seed=3, scale=1.0)
    world.cos[:], world.sin[:] = 1.0, 0.0
    world.qkv[0][:, :16] = 1.0
    world.qkv[0][:, 8:16] *= np.linspace(-50, 50, 1600, dtype=np.float32)[:, None]
    np.testing.assert_allclose(world.whole()[0], world.reference()[0], atol=2e-4)


@pytest.mark.parametrize(
    "mask", [{}, {"sliding_window": 45}, {"softcap": 5.0}, {"dtype": np.float16}], ids=str
)
@pytest.mark.parametrize("geometry", [Geometry(), *GEOMETRIES[3:6]], ids=str)
def test_batch_and_chunks_change_no_bit(geometry: Geometry, mask: dict[str, Any]) -> None:
    rng = np.random.default_rng(4)
    world = World(geometry, [1, 15, 64, 97, 150, 203, 570], seed=5, **mask)
    expected = world.whole()
    for _ in range(4):
        world.clear()
        for shares in random_schedule(rng, world.lengths):
            for share, output in zip(shares, world.step(shares), strict=True):
                alone = expected[share.sequence][share.start : share.start + share.count]
                assert output.tobytes() == alone.tobytes()


def test_chunks_of_keys_do_not_depend_on_where_a_window_begins() -> None:
    geometry = Geometry(num_heads=2, num_kv_heads=1, head_dim=16)
    world = World(geometry, [1300], seed=10, sliding_window=700)
    expected = world.whole()[0]
    for shares in random_schedule(np.random.default_rng(11), world.lengths):
        output = world.step(shares)[0]
        assert output.tobytes() == expected[shares[0].start : shares[0].start + shares[0].count].tobytes()


def test_a_poisoned_sequence_keeps_to_itself() -> None:
    shares = [[Share(i, 0, 40) for i in range(3)], [Share(i, 40, 1) for i in range(3)]]
    world = World(Geometry(), [41, 41, 41], seed=6)
    clean = [world.step(step) for step in shares]
    for poison in (np.nan, np.inf, -np.inf):
        world.clear()
        world.qkv[1][5] = poison
        poisoned = [world.step(step) for step in shares]
        for before, after in zip(clean, poisoned, strict=True):
            assert before[0].tobytes() == after[0].tobytes()
            assert before[2].tobytes() == after[2].tobytes()
            assert not np.isfinite(after[1][5:]).all(axis=1).any()


def test_cache_holds_the_rotated_keys_and_the_values() -> None:
    geometry = Geometry(num_heads=4, num_kv_heads=2, head_dim=40, block_size=32)
    world = World(geometry, [70], seed=7)
    world.step([Share(0, 0, 50)])
    world.step([Share(0, 50, 20)])
    layer = world.cache.layer(0)
    tokens = world.qkv[0].reshape(70, -1, 40)
    positions = np.arange(70)
    blocks, slots = world.block_tables[0, positions // 32], positions % 32
    keys = reference.rotate(tokens[:, 4:6], world.cos, world.sin)
    np.testing.assert_allclose(layer.keys()[blocks, :, slots], keys, atol=1e-6)
    np.testing.assert_array_equal(layer.values()[blocks, :, slots], tokens[:, 6:])
    assert np.isnan(layer.values()).sum() == np.isnan(layer.keys()).sum() == (layer.keys().size - 70 * 80)


def test_blocks_of_a_shared_prefix_are_not_rewritten() -> None:
    world = World(Geometry(), [64, 64], seed=8)
    world.step([Share(0, 0, 64)])
    world.qkv[1][:32] = world.qkv[0][:32]
    world.block_tables[1, :2] = world.block_tables[0, :2]
    before = world.cache.layer(0).keys()[world.block_tables[0]]
    shared = world.step([Share(1, 32, 32)])[0]
    assert (world.cache.layer(0).keys()[world.block_tables[0]] == before).all()
    np.testing.assert_allclose(shared, world.reference()[1][32:], atol=5e-6)


def test_runs_on_other_threads_at_the_same_time() -> None:
    worlds = [World(Geometry(), [120], seed=seed) for seed in range(4)]
    expected = [world.whole()[0] for world in worlds]
    results: dict[int, bytes] = {}

    def run(i: int) -> None:
        for _ in range(20):
            results[i] = worlds[i].step([Share(0, 0, 120)])[0].tobytes()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(4)] == [e.tobytes() for e in expected]


def test_one_object_serves_models_of_different_size() -> None:
    attention = PagedAttention()
    for geometry in (Geometry(head_dim=8), Geometry(head_dim=128), GEOMETRIES[5], Geometry()):
        world = World(geometry, [50], seed=9)
        qkv = world.qkv[0]
        out = np.full((50, geometry.num_heads * geometry.head_dim), np.nan, np.float32)
        attention(
            qkv, world.cache.layer(0), world.layout([Share(0, 0, 50)]), world.cos, world.sin, out, scale=0.125
        )
        np.testing.assert_allclose(out, world.reference()[0], atol=5e-6)


class TestCache:
    def test_memory_is_committed_as_blocks_are_written(self) -> None:
        def resident_kib() -> int:
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * resource.getpagesize() // 1024

        before = resident_kib()
        cache = allocate_kv_cache(30, 20_000, 16, 3, 64)
        assert cache.num_bytes > 13e9
        assert resident_kib() - before < 20_000

    def test_float16_takes_half(self) -> None:
        assert kv_block_bytes(16, 3, 72, np.float16) * 2 == kv_block_bytes(16, 3, 72)
        if supports_float16():
            assert allocate_kv_cache(2, 5, 16, 3, 72, np.float16).num_bytes == 5 * kv_block_bytes(16, 3, 72)

    def test_other_types_are_refused(self) -> None:
        with pytest.raises(ValueError, match="float32 or float16"):
            allocate_kv_cache(1, 1, 16, 1, 8, np.float64)

    def test_float16_needs_the_processor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engine_runtime.kernels.cpu.supports_float16", lambda: False)
        with pytest.raises(RuntimeError, match="F16C"):
            allocate_kv_cache(1, 1, 16, 1, 8, np.float16)

    def test_size_of_a_block(self) -> None:
        cache = allocate_kv_cache(2, 5, 16, 3, 72)
        assert cache.num_bytes == 2 * 5 * kv_block_bytes(16, 3, 72)
        assert kv_block_bytes(16, 3, 64) == 4 * 16 * 3 * 64 * 2

    @pytest.mark.parametrize(
        ("block_size", "head_dim"), [(8, 64), (0, 64), (20, 64), (16, 12), (16, 264), (16, 0)]
    )
    def test_impossible_shapes_are_refused(self, block_size: int, head_dim: int) -> None:
        with pytest.raises(ValueError, match="must be a multiple"):
            allocate_kv_cache(1, 1, block_size, 1, head_dim)


class TestStepLayout:
    @pytest.mark.parametrize(
        ("query_start", "context_len", "block_tables"),
        [
            ([1, 2], [1], [[0]]),
            ([0, 2, 3], [2], [[0]]),
            ([0, 0], [1], [[0]]),
            ([0, 3], [2], [[0]]),
            ([0, 1], [1], [0]),
            ([0, 1], [1], [[0], [1]]),
        ],
    )
    def test_contradictions_are_refused(
        self, query_start: list[int], context_len: list[int], block_tables: list[object]
    ) -> None:
        with pytest.raises(ValueError, match=r"must"):
            StepLayout(np.array(query_start), np.array(context_len), np.array(block_tables))

    def test_blocks_that_do_not_exist_are_found(self) -> None:
        def layout(*blocks: int) -> StepLayout:
            return StepLayout(np.array([0, 1]), np.array([33]), np.array([blocks]))

        layout(4, 0, 3, -1).check_blocks(5, 16)
        for blocks in ((4, 5, 3), (4, -1, 3)):
            with pytest.raises(ValueError, match="outside"):
                layout(*blocks).check_blocks(5, 16)
        with pytest.raises(ValueError, match="shorter"):
            layout(1, 2).check_blocks(5, 16)

    def test_tiles_cover_every_token_once(self) -> None:
        layout = StepLayout(np.array([0, 1, 60]), np.array([9, 80]), np.zeros((2, 5)))
        for group in (1, 3, 7, 30):
            covered = [
                (sequence, token)
                for sequence, first, last in layout.tiles(group).tolist()
                for token in range(first, last)
            ]
            assert covered == [(0, 0)] + [(1, token) for token in range(59)]


def test_wrong_arrays_are_refused() -> None:
    world = World(Geometry(), [20])
    layer, layout, qkv = world.cache.layer(0), world.layout([Share(0, 0, 20)]), world.qkv[0]
    out = np.empty((20, 576), np.float32)
    attention = PagedAttention()
    for wrong_qkv, wrong_out in (
        (qkv[:19], out),
        (qkv, out[:19]),
        (qkv[:, :-64], out),
        (qkv.astype(np.float64), out),
        (np.asfortranarray(qkv), out),
        (qkv, np.asfortranarray(out)),
    ):
        with pytest.raises(ValueError, match="must be"):
            attention(wrong_qkv, layer, layout, world.cos, world.sin, wrong_out, scale=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positions"):
        attention(qkv, layer, layout, world.cos[:19], world.sin[:19], out, scale=1.0)
