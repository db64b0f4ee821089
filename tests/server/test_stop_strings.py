"""The stop string matcher against a search in the whole text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.stop_strings import StopStringMatcher

LETTERS = st.text("ab", min_size=1, max_size=5)


def first_match(text: str, stop: list[str]) -> tuple[int, str] | None:
    """By definition: the shortest prefix of the text that ends with a stop string, and the longest such
    string.
    """
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return end, max(found, key=len)
    return None


@settings(deadline=None)
@given(
    stop=st.lists(LETTERS, min_size=1, max_size=6), pieces=st.lists(st.text("abc", max_size=6), max_size=10)
)
def test_finds_the_stop_string_that_is_complete_first(stop: list[str], pieces: list[str]) -> None:
    matcher = StopStringMatcher(stop)
    seen = ""
    for piece in pieces:
        found = matcher.feed(piece)
        expected = first_match(seen + piece, stop)
        if found is not None:
            assert (len(seen) + found[0], found[1]) == expected
            return
        assert expected is None
        seen += piece
        prefixes = {s[:n] for s in stop for n in range(len(s))}
        assert matcher.num_held == max(n for n in range(len(seen) + 1) if seen[len(seen) - n :] in prefixes)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStringMatcher(["a", ""])


def test_time_is_linear_where_naive_search_is_quadratic() -> None:
    matcher = StopStringMatcher(["a" * 20_000 + "b", "a" * 19_999 + "c"])
    start = time.process_time()
    for _ in range(60_000):
        assert matcher.feed("a") is None
    assert matcher.num_held == 20_000
    assert time.process_time() - start < 5
