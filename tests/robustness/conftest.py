from __future__ import annotations

from pathlib import Path

import pytest

from server.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    """The real tokenizer of the default model. Nothing in it changes."""
    return load_tokenizer(smollm2_path)
