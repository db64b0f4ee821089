"""Faults on purpose: an executor whose steps fail, hang and compute nonsense where they are told to."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from scheduler.executor import Executor, ExecutorLostError, OutOfDeviceMemoryError
from scheduler.messages import ExecutorSpec, ModelRunnerOutput, SchedulerOutput

_ACTIONS: dict[str, tuple[str, ...]] = {
    "step": ("raise", "memory", "lost", "sleep"),
    "sequence": ("raise", "nan"),
}
_FAULT = re.compile(r"(step|sequence):([1-9]\d{0,8}):([a-z]+)(?:=(\d{1,4}(?:\.\d{1,3})?))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and when.

    Attributes:
        point: the ``step`` as a whole, or the first ``sequence`` that it samples for.
        step: id of the step; an engine counts from 1.
        action: ``raise`` (a sequence: in every step from this one on), ``memory`` (the device has none left),
            ``lost`` (the device is gone), ``sleep`` (before the step); ``nan`` (the logits of a sequence).
        seconds: of ``sleep``.
    """

    point: str
    step: int
    action: str
    seconds: float = 0.0


class FaultsError(ValueError):
    """A text that names no faults."""


def parse_faults(text: str) -> tuple[Fault, ...]:
    """``POINT:STEP:ACTION[=SECONDS]``, several with commas. Raises FaultsError."""
    faults = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _FAULT.fullmatch(part)
        if match is None or match[3] not in _ACTIONS[match[1]] or (match[3] == "sleep") != bool(match[4]):
            known = ", ".join(f"{point}:N:{name}" for point, names in _ACTIONS.items() for name in names)
            raise FaultsError(f"{part!r} is no fault; there are {known} (sleep=SECONDS)")
        faults.append(Fault(match[1], int(match[2]), match[3], float(match[4] or 0)))
    return tuple(faults)


class InjectedFaultError(Exception):
    """What ``raise`` raises."""


class FaultyExecutor:
    """Passes steps on to another executor, and spoils what comes back."""

    def __init__(self, inner: Executor, faults: Sequence[Fault]) -> None:
        self._inner = inner
        self._faults = tuple(faults)
        self._poisonous: set[str] = set()

    @property
    def spec(self) -> ExecutorSpec:
        return self._inner.spec

    @property
    def max_in_flight(self) -> int:
        return self._inner.max_in_flight

    def execute(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        now = [fault for fault in self._faults if fault.step == step.step_id]
        time.sleep(sum(fault.seconds for fault in now))
        sampling = [share.request_id for share in step.scheduled if share.samples]
        for fault in now:
            if (fault.point, fault.action) == ("sequence", "raise") and sampling:
                self._poisonous.add(sampling[0])
        error = self._error(step, now)
        has_nan = any(fault.action == "nan" for fault in now) and bool(sampling)
        # The step runs all the same: the executor has to learn what is new in it.
        future = self._inner.execute(step)
        return _Spoilt(future, error, has_nan) if error is not None or has_nan else future

    def shutdown(self) -> None:
        self._inner.shutdown()

    def _error(self, step: SchedulerOutput, now: Sequence[Fault]) -> Exception | None:
        for fault in now:
            if fault.action == "lost":
                return ExecutorLostError(f"step {step.step_id} was told to lose the device")
            if fault.action == "memory":
                return OutOfDeviceMemoryError(f"step {step.step_id} was told to have no memory")
            if (fault.point, fault.action) == ("step", "raise"):
                return InjectedFaultError(f"step {step.step_id} was told to fail")
        if not self._poisonous.isdisjoint(share.request_id for share in step.scheduled):
            return InjectedFaultError("a sequence was told to fail")
        return None


class _Spoilt(Future[ModelRunnerOutput]):
    """The result of a step, made worse when it is asked for."""

    def __init__(self, inner: Future[ModelRunnerOutput], error: Exception | None, has_nan: bool) -> None:
        super().__init__()
        self._inner = inner
        self._error = error
        self._has_nan = has_nan

    def result(self, timeout: float | None = None) -> ModelRunnerOutput:
        result = self._inner.result(timeout)
        if self._error is not None:
            raise self._error
        first, *others = result.sampled
        return replace(result, sampled=(replace(first, is_valid=False), *others))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return self._inner.exception(timeout) or self._error
