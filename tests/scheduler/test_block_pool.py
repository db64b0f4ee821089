"""The block pool: references, the order of reuse, and prefixes that are found exactly when they are there."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import pytest

from scheduler.block_pool import BlockKey, BlockPool, sha256

SIZE = 4


def weak_hash(data: bytes) -> bytes:
    """Two bits: nearly everything collides."""
    return bytes([hashlib.sha256(data).digest()[0] & 3])


def fill(
    pool: BlockPool, token_ids: list[int], salt: str | None = None, owner: str | None = None
) -> list[int]:
    """Allocates and indexes the full blocks of ``token_ids``."""
    block_ids = pool.allocate(len(token_ids) // SIZE)
    assert block_ids is not None
    keys: list[BlockKey] = []
    for position, block_id in enumerate(block_ids):
        pool.extend_keys(keys, token_ids, salt, position + 1)
        keys[position] = pool.cache(block_id, keys[position], owner)
    return block_ids


def match(pool: BlockPool, token_ids: list[int], salt: str | None = None) -> list[int]:
    return pool.match_prefix([], token_ids, salt, len(token_ids) // SIZE)


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4, SIZE, "")
    first = pool.allocate(3)
    assert first is not None
    assert len(set(first)) == 3
    assert pool.allocate(2) is None
    assert pool.allocate(1, num_spare=1) is None
    assert pool.num_free == 1
    second = pool.allocate(1)
    assert second is not None
    pool.check_invariants([first, second])
    pool.release(first)
    pool.release(second)
    pool.check_invariants([])


def test_a_shared_block_is_free_only_when_all_have_released_it() -> None:
    pool = BlockPool(4, SIZE, "")
    first = fill(pool, [1, 2, 3, 4])
    second = pool.allocate(1, shared=first)
    assert second is not None
    pool.check_invariants([first, first + second])
    pool.release(first)
    assert pool.num_free == 2
    pool.check_invariants([first + second])
    pool.release(first + second)
    assert pool.num_free == 4


def test_hits_that_are_free_count_as_taken() -> None:
    pool = BlockPool(3, SIZE, "")
    hits = fill(pool, [1, 2, 3, 4])
    pool.release(hits)
    assert pool.allocate(3, shared=hits) is None
    assert pool.num_free == 3
    assert pool.allocate(2, shared=hits) is not None
    assert pool.num_free == 0


def test_the_least_recently_released_contents_are_lost_first() -> None:
    pool = BlockPool(5, SIZE, "")
    old, new = list(range(8)), list(range(100, 108))
    old_blocks, new_blocks = fill(pool, old), fill(pool, new)
    pool.release(old_blocks)
    pool.release(new_blocks)
    assert pool.allocate(1) == [4]  # never held anything
    assert pool.allocate(1) == [old_blocks[1]]  # the end of a prefix goes before its beginning
    assert match(pool, old) == old_blocks[:1]
    assert pool.allocate(1) == [old_blocks[0]]
    assert match(pool, old) == []
    assert match(pool, new) == new_blocks


def test_nobody_drives_out_the_prefixes_of_others() -> None:
    pool = BlockPool(16, SIZE, "")
    small = list(range(8))
    pool.release(fill(pool, small, owner="small"))
    for start in range(100, 2000, 8):  # a flood of prompts that differ
        pool.release(fill(pool, list(range(start, start + 8)), owner="large"))
        pool.check_invariants([])
    assert len(match(pool, small)) == 2
    assert len(match(pool, list(range(start, start + 8)))) == 2  # the newest of the flood's own
    # Blocks are worth nothing unless somebody can have them: all of them are there for one who needs them.
    everything = pool.allocate(16)
    assert everything is not None
    pool.check_invariants([everything])
    assert match(pool, small) == []


def test_owners_share_what_there_is_evenly() -> None:
    pool = BlockPool(12, SIZE, "")
    for start in range(0, 4000, 4):
        owner = "ab"[start // 4 % 2] if start < 2000 else "abc"[start // 4 % 3]
        pool.release(fill(pool, list(range(start, start + 4)), owner=owner))
        pool.check_invariants([])
    kept = [start // 4 % 3 for start in range(2000, 4000, 4) if match(pool, list(range(start, start + 4)))]
    assert [kept.count(owner) for owner in range(3)] == [4, 4, 4]


def test_a_hit_makes_a_prefix_recent() -> None:
    pool = BlockPool(4, SIZE, "")
    first, second = fill(pool, list(range(8))), fill(pool, list(range(100, 108)))
    pool.release(first)
    pool.release(second)
    assert pool.allocate(0, shared=match(pool, list(range(8)))) == []
    pool.release(first)
    assert pool.allocate(2) == [second[1], second[0]]


def test_blocks_without_indexed_contents_go_first() -> None:
    pool = BlockPool(3, SIZE, "")
    indexed = fill(pool, [1, 2, 3, 4])
    pool.release(indexed)
    plain = pool.allocate(2)
    assert plain is not None
    pool.release(plain)
    assert pool.allocate(2) == plain
    assert match(pool, [1, 2, 3, 4]) == indexed


def test_equal_contents_are_indexed_once() -> None:
    pool = BlockPool(6, SIZE, "")
    tokens = list(range(8))
    first, second = fill(pool, tokens), fill(pool, tokens)
    assert pool.num_indexed == 2
    assert match(pool, tokens) == first
    pool.check_invariants([first, second])


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(([9, 1, 2, 3, 4, 5, 6, 7], None, "seed"), id="tokens"),
        pytest.param((list(range(8)), "", "seed"), id="empty salt"),
        pytest.param((list(range(8)), "salt", "seed"), id="salt"),
        pytest.param((list(range(8)), "\ud800", "seed"), id="surrogate salt"),
    ],
)
def test_other_prefixes_are_not_hit(other: tuple[list[int], str | None, str]) -> None:
    tokens, salt, seed = other
    pool = BlockPool(4, SIZE, seed)
    fill(pool, list(range(8)))
    assert match(pool, tokens, salt) == []
    assert match(pool, [0, 1, 2, 3, 9, 9, 9, 9]) == [0]


def test_a_block_is_hit_only_behind_its_own_prefix() -> None:
    pool = BlockPool(4, SIZE, "")
    fill(pool, [1, 1, 1, 1, 2, 2, 2, 2])
    assert match(pool, [2, 2, 2, 2]) == []
    assert match(pool, [3, 3, 3, 3, 2, 2, 2, 2]) == []


def test_digests_are_those_of_a_chain_salted_with_the_model() -> None:
    keys: list[BlockKey] = []
    BlockPool(1, SIZE, "model").extend_keys(keys, list(range(9)), "salt", 2)
    digest = hashlib.sha256(b"('model', 'salt')").digest()
    for start in (0, 4):
        tokens = b"".join(token.to_bytes(8, "little") for token in range(start, start + 4))
        digest = hashlib.sha256(digest + tokens).digest()
    assert keys[1].digest == digest
    assert keys[1].parent is keys[0]
    others: list[BlockKey] = []
    BlockPool(1, SIZE, "other model").extend_keys(others, list(range(9)), "salt", 2)
    assert others[1].digest != digest


def random_operations(pool: BlockPool, rng: random.Random, num_operations: int) -> int:
    """Random life of a pool against a plain list of what each block contains. Returns the number of hits."""
    contents: dict[int, tuple[str | None, tuple[int, ...]]] = {}  # block -> (salt, the whole prefix)
    held: list[list[int]] = []
    num_hits = 0
    for _ in range(num_operations):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            tokens = [rng.randrange(2) for _ in range(SIZE * rng.randrange(1, 5))]
            salt = rng.choice([None, "a"])
            keys: list[BlockKey] = []
            hits = pool.match_prefix(keys, tokens, salt, len(tokens) // SIZE)
            for position, block_id in enumerate(hits):
                assert contents[block_id] == (salt, tuple(tokens[: SIZE * (position + 1)]))
            new = pool.allocate(len(tokens) // SIZE - len(hits), shared=hits)
            if new is None:
                continue
            num_hits += len(hits)
            block_ids = hits + new
            for position in range(len(hits), len(block_ids)):
                contents[block_ids[position]] = (salt, tuple(tokens[: SIZE * (position + 1)]))
                pool.extend_keys(keys, tokens, salt, position + 1)
                keys[position] = pool.cache(block_ids[position], keys[position])
            held.append(block_ids)
        pool.check_invariants(held)
    for block_ids in held:
        pool.release(block_ids)
    pool.check_invariants([])
    return num_hits


def random_lives(hash_function: Callable[[bytes], bytes]) -> int:
    """Hits of 30 random lives."""
    return sum(
        random_operations(BlockPool(12, SIZE, "", hash_function=hash_function), random.Random(seed), 60)
        for seed in range(30)
    )


@pytest.mark.parametrize(
    ("hash_function", "min_hits"),
    [(sha256, 100), (weak_hash, 5), (lambda data: b"", 1)],
    ids=["sha256", "2 bits", "0 bits"],
)
def test_hits_are_exact_even_if_all_digests_collide(
    hash_function: Callable[[bytes], bytes], min_hits: int
) -> None:
    assert random_lives(hash_function) >= min_hits


def test_that_test_fails_without_the_comparison_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockKey, "has_same_prefix", lambda self, other: True)
    with pytest.raises(AssertionError):
        random_lives(weak_hash)


def test_comparing_the_own_tokens_of_each_block_would_not_be_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        BlockKey,
        "has_same_prefix",
        lambda self, other: (self.token_ids, self.cache_salt) == (other.token_ids, other.cache_salt),
    )
    with pytest.raises(AssertionError):
        random_lives(weak_hash)


@pytest.mark.parametrize("damage", ["references", "free", "index"])
def test_the_invariants_notice_damage(damage: str) -> None:
    pool = BlockPool(4, SIZE, "")
    blocks = fill(pool, list(range(8)))
    pool.check_invariants([blocks])
    if damage == "references":
        pool._num_references[blocks[0]] += 1
    elif damage == "free":
        pool._blank.popitem()
    else:
        pool._index.popitem()
    with pytest.raises(AssertionError):
        pool.check_invariants([blocks])


def test_a_flush_forgets_contents_and_leaves_held_blocks_alone() -> None:
    pool = BlockPool(8, SIZE, "")
    gone, held = [1, 2, 3, 4, 5, 6, 7, 8], [9] * 8
    pool.release(fill(pool, gone))
    holder = fill(pool, held)
    assert pool.flush() == 4
    assert match(pool, gone) == match(pool, held) == []
    pool.check_invariants([holder])
    assert pool.num_free == 6
    other = fill(pool, held)  # computed again, and found again
    assert match(pool, held) == other
    pool.check_invariants([holder, other])
    pool.release(holder)
    pool.release(other)
    pool.check_invariants([])
    assert pool.flush() == 2
    assert pool.flush() == 0
