from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.server_process import ServerProcess


@pytest.fixture(scope="session")
def server(smollm2_path: Path) -> Iterator[ServerProcess]:
    """One server with the default model for all tests that leave it as it was."""
    with ServerProcess("--max-model-len", "2048") as server:
        yield server
