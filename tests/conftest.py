"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.model_source import fetch_default_model


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of the embedded default model, fetched once into the user's cache."""
    return fetch_default_model()
