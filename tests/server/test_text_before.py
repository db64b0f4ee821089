"""Regexes of text before a marker, against ``str.find``."""

from __future__ import annotations

import random
import re

import pytest

from server.text_before import text_before


@pytest.mark.parametrize(
    "marker", ["ab", "<tool_call>", "</think>", "[X]", "{-]^", "(*)", "<\n\n>", "<##", "#~&-\\", "/$."]
)
def test_regexes(marker: str) -> None:
    before = text_before(marker)
    assert before is not None
    until, without = re.compile(before.until), re.compile(before.without)
    chance = random.Random(marker)
    num_found = 0
    for _ in range(3000):
        pieces = chance.choices([marker, *(marker[:n] for n in range(len(marker))), *marker, "q"], k=4)
        text = "".join(pieces)
        place = text.find(marker)
        assert bool(without.fullmatch(text)) == (place < 0), text
        assert bool(until.fullmatch(text)) == (0 <= place == len(text) - len(marker)), text
        num_found += place >= 0
    assert 100 < num_found < 2900


@pytest.mark.parametrize("marker", ["x", "```", "\n</parameter>\n", "<é", "<" + "a" * 40, "a\x00"])
def test_markers_that_need_more(marker: str) -> None:
    assert text_before(marker) is None
