"""The text that perplexities are measured on, in windows.

It is ours: plain English prose, dialogue, questions and a little Python, about 3,700 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from server.tokenizer import load_tokenizer

WINDOW = 512
_TEXT = Path(__file__).with_name("perplexity_text.txt")


def text_windows(model: Path) -> list[Sequence[int]]:
    """Token ids of each window: ``WINDOW`` of them that predict, and one more that is predicted only."""
    token_ids = load_tokenizer(model).encode(_TEXT.read_text(), add_special_tokens=False)
    return [token_ids[first : first + WINDOW + 1] for first in range(0, len(token_ids) - 1, WINDOW)]
