"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scheduler.growth_forecast import GrowthForecast
from server.model_source import fetch_default_model

# Of the reference computations that use the Python package; the runtime of ours says it for itself.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


# Folders whose tests share what takes long to start: a running server, loaded models.
_TOGETHER = ("tests/end_to_end/", "tests/engine_runtime/executors/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of the processes that run tests, one gets all of a file, and one all that share something."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return next((folder for folder in _TOGETHER if file.startswith(folder)), file)

    # In the order of collection instead of the files with most tests first, which are not the longest.
    config.option.loadscopereorder = False
    return Together(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes early, so that no process works on it alone at the end.

    Models compute on all cores, and two processes that do so slow each other down by half. So they run beside
    the server's tests, which mostly wait, and not beside the end-to-end tests.
    """
    end_to_end, models = _TOGETHER

    def place(item: pytest.Item) -> tuple[bool, ...]:
        starts = item.nodeid.startswith
        return not starts(end_to_end), starts("tests/server/"), starts(models)

    items.sort(key=place)


@pytest.fixture
def frequent_preemptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forecast of what running sequences will need, as if it were wrong."""
    monkeypatch.setattr(GrowthForecast, "is_needed", lambda *arguments: False)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of the embedded default model, fetched once into the user's cache."""
    return fetch_default_model()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files of a certificate for ``localhost`` and of its key, made anew."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    certfile, keyfile = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", keyfile, "-out", certfile],
        check=True, capture_output=True,
    )  # fmt: skip
    return certfile, keyfile
