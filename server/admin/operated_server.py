"""What an operator's hands reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from scheduler.messages import StepPhase
from server.service import Service


class OperatedEngine(Protocol):
    """What operators ask of an engine."""

    async def flush_prefix_cache(self) -> int:
        """Forgets all prefixes; returns the number of their blocks. Raises EngineDeadError."""
        ...

    async def profile(self, num_steps: int, seconds: float) -> tuple[StepPhase, ...]:
        """The phases of the next steps, of fewer if they take longer than so many seconds.

        Raises:
            EngineDeadError: the engine is not there, or ends meanwhile.
            ProfileRunningError: one is being taken.
        """
        ...

    def set_log_level(self, level: str) -> None:
        """Of this engine and those that come after it."""
        ...


@dataclass(frozen=True, slots=True)
class OperatedServer:
    """One API process and its engine."""

    service: Service
    engine: OperatedEngine
