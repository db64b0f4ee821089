"""What this process may use of the machine: cores and memory, whatever set the limit."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_TOPOLOGY = Path("/sys/devices/system/cpu")
_UNLIMITED = 1 << 60


def usable_cores() -> int:
    """Physical cores among the processors that this process may run on, within the quota of its control
    group.

    Two threads of one core share its multipliers, so a second one slows a matrix product down.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = {_siblings(processor) for processor in allowed}
    count = len(cores) or os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, count if quota is None else min(count, round(quota)))


def available_memory() -> int:
    """Bytes that can be allocated before the machine swaps or the control group's limit is reached."""
    available = _UNLIMITED
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for folder in _cgroup_folders():
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            maximum, current = _number(folder / limit), _number(folder / usage)
            if maximum is not None and current is not None and maximum < _UNLIMITED:
                available = min(available, max(0, maximum - current + _reclaimable(folder)))
    return available


def return_freed_memory() -> None:
    """Gives freed heap memory back to the system; after loading, glibc holds all weights once more."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _siblings(processor: int) -> str:
    path = _TOPOLOGY / f"cpu{processor}" / "topology" / "thread_siblings_list"
    return _read(path).strip() or str(processor)


def _cpu_quota() -> float | None:
    """Cores' worth of time that the control groups allow."""
    quotas = []
    for folder in _cgroup_folders():
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota = _read(folder / "cpu.cfs_quota_us").strip()
            period = _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _reclaimable(folder: Path) -> int:
    """Page cache counts as used memory but is given back on demand."""
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _cgroup_folders() -> Iterator[Path]:
    """The control groups of this process and their parents, version 2 and 1, and the mount of a container."""
    yield _CGROUPS
    for controller in ("memory", "cpu"):
        yield _CGROUPS / controller
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(1, len(parts) + 1):
            for controller in controllers.split(","):
                yield _CGROUPS.joinpath(controller, *parts[:depth])


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
