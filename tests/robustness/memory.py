"""Resident memory of processes over time, and whether it grows."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
# An engine that has just been started has not touched all its buffers yet.
_GROWN_UP_S = 45.0


def resident_bytes(pid: int) -> int:
    """Raises OSError if there is no such process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


@dataclass
class MemoryLog:
    """Samples of processes by role; a role may pass from one process to the next."""

    samples: list[tuple[float, str, int, int]] = field(default_factory=list)

    def add(self, seconds: float, role: str, pid: int, num_bytes: int) -> None:
        """``seconds`` since the beginning, in order."""
        self.samples.append((seconds, role, pid, num_bytes))

    def growth(self, role: str, settle: float) -> float | None:
        """Share by which the memory of a role has grown: the median of the last sixth of the time after
        ``settle`` seconds against that of the first sixth. Of processes that followed each other, only what
        is over 45 s old counts. None: too few samples.
        """
        first_seen: dict[int, float] = {}
        values: list[tuple[float, int]] = []
        for seconds, sampled_role, pid, num_bytes in self.samples:
            if sampled_role == role:
                age = seconds - first_seen.setdefault(pid, seconds)
                if seconds >= settle and (pid == next(iter(first_seen)) or age >= _GROWN_UP_S):
                    values.append((seconds, num_bytes))
        if not values:
            return None
        start, end = values[0][0], values[-1][0]
        part = (end - start) / 6
        early = [num_bytes for seconds, num_bytes in values if seconds <= start + part]
        late = [num_bytes for seconds, num_bytes in values if seconds >= end - part]
        if len(values) < 12 or not part:
            return None
        return statistics.median(late) / statistics.median(early) - 1

    def growth_faults(self, settle: float, most: float) -> list[str]:
        """Roles that have grown by more than the share ``most``."""
        found = {role: self.growth(role, settle) for role in self._roles}
        return [
            f"the memory of {role} grew by {share:.1%} after {settle:.0f} s"
            for role, share in found.items()
            if share is not None and share > most
        ]

    def summary(self, settle: float) -> dict[str, object]:
        """Figures for a report, in MiB."""
        figures: dict[str, object] = {}
        for role in self._roles:
            growth = self.growth(role, settle)
            own = [(seconds, num_bytes / 2**20) for seconds, r, _, num_bytes in self.samples if r == role]
            figures[role] = {
                "growth": None if growth is None else round(growth, 4),
                "most": round(max(value for _, value in own)),
                "by minute": [
                    round(statistics.median(values))
                    for minute in range(int(own[-1][0] // 60) + 1)
                    if (values := [value for seconds, value in own if seconds // 60 == minute])
                ],
            }
        return figures

    @property
    def _roles(self) -> list[str]:
        return sorted({role for _, role, _, _ in self.samples})
