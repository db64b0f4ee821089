from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine_runtime.kernels import cpu_compile

_USE = """
import numba
from engine_runtime.kernels import cpu_compile
from engine_runtime.kernels.cpu_compile import kernel
import numpy as np
from tests.engine_runtime.kernels.test_cpu_simd import exp2
exp2(np.zeros(16, np.float32))
print(numba.config.CACHE_DIR)
"""


def use_in_process(**environment: str) -> Path:
    """Compiles a kernel in another process; returns the directory it was told to use."""
    result = subprocess.run(
        [sys.executable, "-c", _USE],
        env={**os.environ, "NUMBA_CACHE_DIR": "", **environment},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Path(result.stdout.strip())


def test_code_is_kept_in_the_configured_directory(tmp_path: Path) -> None:
    directory = use_in_process(NUMBA_CACHE_DIR=str(tmp_path / "numba"))
    assert directory.parent == tmp_path / "numba"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert list(directory.rglob("*.nbc"))


def test_default_is_in_the_users_cache(tmp_path: Path) -> None:
    directory = use_in_process(XDG_CACHE_HOME=str(tmp_path))
    assert directory.parent == tmp_path / "inflightd" / "numba"


def test_works_where_nothing_can_be_written() -> None:
    directory = use_in_process(NUMBA_CACHE_DIR="/proc/nowhere")
    assert directory.name.startswith("inflightd-numba-")
    assert not directory.exists()


def test_a_directory_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    trusted = cpu_compile.cache_directory(tmp_path)
    assert trusted.parent == tmp_path
    trusted.chmod(0o777)
    assert cpu_compile.cache_directory(tmp_path).parent != tmp_path


def test_any_change_of_the_sources_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "package"
    sources.mkdir()
    (sources / "a.py").write_text("x = 1")
    monkeypatch.setattr(cpu_compile, "_PACKAGE", sources)
    seen = {cpu_compile.cache_directory(tmp_path)}
    assert cpu_compile.cache_directory(tmp_path) in seen
    (sources / "a.py").write_text("x = 2")
    seen.add(cpu_compile.cache_directory(tmp_path))
    (sources / "a.py").rename(sources / "b.py")
    seen.add(cpu_compile.cache_directory(tmp_path))
    assert len(seen) == 3
