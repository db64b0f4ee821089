from __future__ import annotations

from itertools import pairwise

import pytest

from engine_runtime.executors.tensorrt.buckets import (
    Buckets,
    bucket_for,
    decode_buckets,
    largest_step,
    saturating_tokens,
    token_buckets,
)


@pytest.mark.parametrize("largest", [1, 3, 16, 64, 200, 256, 257, 1000, 4096])
def test_buckets_rise_to_the_largest_step(largest: int) -> None:
    for buckets in (decode_buckets(largest), token_buckets(largest)):
        assert buckets[-1] == largest
        assert all(a < b for a, b in pairwise(buckets))


def test_little_of_a_step_is_padding() -> None:
    buckets = token_buckets(65536)
    for number in range(97, 65537, 7):
        padding = bucket_for(buckets, number) - number
        assert padding <= number * (1 / 2 if number <= 512 else 1 / 4)
    assert len(buckets) < 64


def test_a_step_gets_the_smallest_bucket_that_holds_it() -> None:
    assert [bucket_for((1, 4, 9), number) for number in (1, 2, 4, 5, 9)] == [1, 4, 4, 9, 9]
    with pytest.raises(ValueError, match="10 is more than the largest bucket, 9"):
        bucket_for((1, 4, 9), 10)


@pytest.mark.parametrize(("tokens", "rows"), [(50, 64), (8192, 256), (64, 64), (1, 64)])
def test_no_bucket_is_larger_than_the_buffers(tokens: int, rows: int) -> None:
    assert max(*token_buckets(tokens), *decode_buckets(rows)) == largest_step(tokens, rows)


def test_what_is_missing_is_padded_to_the_next_size_and_remembered() -> None:
    buckets = Buckets((1, 2, 4, 8, 16), missing=(1, 4, 8))
    assert [buckets.choose(number) for number in (1, 2, 3, 4, 9)] == [2, 2, 16, 16, 16]
    assert buckets.missing == [(1, 1), (2, 4), (0, 8)]
    buckets.add(4)
    assert [buckets.choose(number) for number in (3, 5)] == [4, 16]
    assert buckets.missing == [(1, 1), (1, 8)]
    with pytest.raises(ValueError, match="17 is more than the largest"):
        buckets.choose(17)


def test_the_largest_is_never_missing() -> None:
    with pytest.raises(ValueError, match="16, must be there"):
        Buckets((8, 16), missing=(16,))


def test_the_narrowest_product_says_when_a_gpu_is_saturated() -> None:
    assert saturating_tokens(4096, 132) == 1024  # 8 x 16 tiles for 132 multiprocessors
    assert saturating_tokens(8192, 132) == 512
    assert saturating_tokens(64, 30) == 3840
