"""The one thing the scheduler asks of a device."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from scheduler.messages import ExecutorSpec, ModelRunnerOutput, SchedulerOutput


class ExecutorLostError(Exception):
    """The device is of no use any more: only a new process can go on. Raised by the future of a step."""


class OutOfDeviceMemoryError(Exception):
    """The device had no memory for a step, and is as it was before it. Raised by the future of the step."""


class Executor(Protocol):
    """Runs steps in the order in which they are handed over.

    The executor keeps each sequence's tokens and block table from ``NewSequence`` until ``released``, and
    appends every token it samples by itself. So a step may be handed over before the result of the one before
    it is known, up to ``max_in_flight`` steps.
    """

    @property
    def spec(self) -> ExecutorSpec: ...

    @property
    def max_in_flight(self) -> int: ...

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        """Starts a step. A failure of the device is raised by the future, never here."""
        ...

    def shutdown(self) -> None:
        """Frees the device. No step may be in flight."""
        ...
