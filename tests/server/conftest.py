"""Fixtures for the tests of the API process."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.chat_template import ChatTemplate
from server.tokenizer import Tokenizer, load_tokenizer
from tests.server.text_fixtures import TEMPLATES


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    """The real tokenizer of the default model. Nothing in it changes."""
    return load_tokenizer(smollm2_path)


@pytest.fixture
def thinking(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """The tokenizer with a template like Qwen3's: tools, Hermes calls, reasoning."""
    template = ChatTemplate((TEMPLATES / "thinking.jinja").read_text())
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return tokenizer
