from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine_runtime.executors.onnxruntime import cpu_limits


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four processors on two cores, no control group."""
    monkeypatch.setattr(cpu_limits, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cpu_limits, "_TOPOLOGY", tmp_path / "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    for processor, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        _write(tmp_path / "cpu" / f"cpu{processor}" / "topology" / "thread_siblings_list", siblings)
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_threads_of_one_core_count_once(machine: Path) -> None:
    assert cpu_limits.usable_cores() == 2


def test_affinity_limits_the_cores(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    assert cpu_limits.usable_cores() == 1


def test_processors_without_topology_count_each(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 8, 9}, raising=False)
    assert cpu_limits.usable_cores() == 3


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 2), ("100000 100000", 1), ("20000 100000", 1), ("900000 100000", 2)]
)
def test_quota_of_version_2_limits_the_cores(machine: Path, quota: str, cores: int) -> None:
    _write(machine / "cgroup" / "cpu.max", quota)
    assert cpu_limits.usable_cores() == cores


def test_quota_of_version_1_limits_the_cores(machine: Path) -> None:
    _write(machine / "cgroup" / "cpu" / "cpu.cfs_quota_us", "100000")
    _write(machine / "cgroup" / "cpu" / "cpu.cfs_period_us", "100000")
    assert cpu_limits.usable_cores() == 1


def test_memory_without_a_limit_is_what_the_machine_has(machine: Path) -> None:
    _write(machine / "cgroup" / "memory.max", "max")
    _write(machine / "cgroup" / "memory.current", "1000")
    assert 0 < cpu_limits.available_memory() < 1 << 50


def test_limit_of_version_2_less_what_is_used_but_for_page_cache(machine: Path) -> None:
    _write(machine / "cgroup" / "memory.max", "5000")
    _write(machine / "cgroup" / "memory.current", "3000")
    _write(machine / "cgroup" / "memory.stat", "anon 2500\ninactive_file 400")
    assert cpu_limits.available_memory() == 2400


def test_limit_of_version_1(machine: Path) -> None:
    _write(machine / "cgroup" / "memory" / "memory.limit_in_bytes", "5000")
    _write(machine / "cgroup" / "memory" / "memory.usage_in_bytes", "6000")
    assert cpu_limits.available_memory() == 0
