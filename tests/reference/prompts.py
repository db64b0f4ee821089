"""Text for the prompts of the default model: plain sentences put together at random, so that it is ours."""

from __future__ import annotations

import random
from collections.abc import Callable

# Lengths in tokens: short ones, each side of the block and chunk sizes in use, and up to 1,500.
PROMPT_LENGTHS = (
    *(1, 2, 3, 5, 7, 8, 11, 15, 16, 17, 23, 31, 32, 33, 40, 48, 57, 63, 64, 65),
    *(80, 96, 110, 127, 128, 129, 150, 200, 255, 256, 257, 300, 384, 511, 512, 600, 777, 1000, 1250, 1500),
)

_WHO = "A tired sailor|The old clockmaker|My neighbour|A young botanist|The night train|An honest thief"
_DID = "found|repaired|described|forgot|painted|measured|borrowed|followed|defended|lost|translated|counted"
_WHAT = "a brass telescope|seven letters|the river's mouth|an unfinished map|two grey horses|the last recipe"
_WHERE = "near the harbour|in the attic|before sunrise|during the flood|at the border|under a stone bridge"
_THEN = "Nobody asked why.|It was the 14th of March.|The price was 3.50 crowns.|Everyone laughed.|Why not?"
_OPENING = "def area(width, height):\n    return|The capital of France is|1, 2, 3, 5, 8,|Dear Sir or Madam,"
_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def make_prompts(encode: Callable[[str], list[int]]) -> list[list[int]]:
    """One list of token ids for each of ``PROMPT_LENGTHS``; every third ends as a chat turn does."""
    return [
        make_prompt(encode, length, i, is_chat=length > 40 and length % 3 == 0)
        for i, length in enumerate(PROMPT_LENGTHS)
    ]


def gemma3_prompts(encode: Callable[[str], list[int]]) -> list[list[int]]:
    """A few prompts, the longest beyond the sliding window of 512; ``encode`` adds the first token."""
    return [make_prompt(encode, length, length) for length in (1, 12, 150, 500, 700)]


def make_prompt(
    encode: Callable[[str], list[int]], length: int, seed: int, *, is_chat: bool = False
) -> list[int]:
    """The first ``length`` tokens of a text, or the last ones of a turn in SmolLM2's format."""
    chance = random.Random(seed)

    def pick(words: str) -> str:
        return chance.choice(words.split("|"))

    text = pick(_OPENING) + " "
    ids: list[int] = []
    while len(ids) < length + 40:
        sentences = [f"{pick(_WHO)} {pick(_DID)} {pick(_WHAT)} {pick(_WHERE)}." for _ in range(4)]
        text += " ".join(sentences) + f" {pick(_THEN)} "
        ids = encode(_CHAT.format(text.strip()) if is_chat else text)
    return ids[-length:] if is_chat else ids[:length]
