"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.model_source import fetch_default_model

# Of the reference computations that use the Python package; the runtime of ours says it for itself.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of the embedded default model, fetched once into the user's cache."""
    return fetch_default_model()
