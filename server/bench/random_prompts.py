"""Prompts of a known length that share no prefix."""

from __future__ import annotations

import random

# Each is one token of SmolLM2's vocabulary, with a space before it or at the start of a text.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city community "
    "name president team minute idea body information back parent face others level office door health "
    "person art war history party result change reason research girl moment air teacher force education "
    "foot boy age policy music market sense"
)
WORDS = tuple(_TEXT.split())


def distinct_prompts(count: int, num_words: int, seed: str) -> list[str]:
    """``count`` texts of random words; the same for the same ``seed``, and no two begin with the same two."""
    generator = random.Random(seed)
    beginnings = generator.sample([(first, second) for first in WORDS for second in WORDS], count)
    return [" ".join([*start, *generator.choices(WORDS, k=num_words - 2)]) for start in beginnings]
