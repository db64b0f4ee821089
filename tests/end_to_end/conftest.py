from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.server_process import ServerProcess


@pytest.fixture(scope="session")
def responses_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server keeps the answers of ``/v1/responses``."""
    return tmp_path_factory.mktemp("responses") / "responses.db"


@pytest.fixture(scope="session")
def admin_uds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The socket of the server's operators."""
    return tmp_path_factory.mktemp("admin") / "socket"


@pytest.fixture(scope="session")
def server(smollm2_path: Path, responses_db: Path, admin_uds: Path) -> Iterator[ServerProcess]:
    """One server with the default model for all tests that leave it as it was; started as TGI is."""
    environment = {"MODEL_ID": "smollm2-135m-instruct", "MAX_TOTAL_TOKENS": "2048"}
    flags = ("--responses-db", str(responses_db), "--admin-uds", str(admin_uds))
    with ServerProcess(*flags, environment=environment) as server:
        yield server
