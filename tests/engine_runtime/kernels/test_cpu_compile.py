from __future__ import annotations

import os
import subprocess
import sys
import time
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


def test_what_no_start_has_used_for_weeks_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def days_ago(directory: Path, days: float) -> None:
        then = time.time() - days * 24 * 3600
        os.utime(directory, (then, then))

    old, recent, foreign = (tmp_path / name for name in ("0123456789abcdef", "f" * 16, "something else"))
    for directory, days in ((old, 30), (recent, 3), (foreign, 30)):
        directory.mkdir()
        (directory / "kernel.nbc").write_bytes(b"code")
        days_ago(directory, days)
    ours = cpu_compile.cache_directory(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        ours.name, recent.name, foreign.name
    }  # fmt: skip
    # A start counts as use, though it writes nothing.
    days_ago(ours, 13.9)
    cpu_compile.cache_directory(tmp_path)
    monkeypatch.setattr(cpu_compile, "_sources_hash", lambda: "a" * 16)
    days_ago(recent, 15)
    cpu_compile.cache_directory(tmp_path)
    assert ours.exists()
    assert not recent.exists()


def test_starts_at_once_do_not_take_each_others_directories(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from engine_runtime.kernels import cpu_compile\n"
        "cpu_compile._KEPT_S = -1.0\n"  # every neighbour is too old at once
        "for i in range(50):\n"
        "    cpu_compile._sources_hash = lambda: sys.argv[1] * 15 + '%x' % (i % 16)\n"
        "    assert cpu_compile.cache_directory(Path(sys.argv[2])).parent == Path(sys.argv[2])\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script, letter, str(tmp_path)], stderr=subprocess.PIPE)
        for letter in "abc"
    ]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()


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
