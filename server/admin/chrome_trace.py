"""Phases of steps as a Chrome trace, which Perfetto and chrome://tracing show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scheduler.messages import StepPhase

_LOOP, _FLIGHT = 1, 2


def chrome_trace(phases: Sequence[StepPhase]) -> dict[str, Any]:
    """The JSON object of the Trace Event Format: complete events ("X"), microseconds from the first phase on.

    One row has what the step loop does, one after the other. The others have each step from the moment when
    it is handed to the executor until its result is there; there are two of them, since two may be in flight.
    """
    began = phases[0].start if phases else 0.0
    events: list[dict[str, Any]] = [
        _row(_LOOP, "step loop"),
        _row(_FLIGHT, "in flight, even steps"),
        _row(_FLIGHT + 1, "in flight, odd steps"),
    ]

    def add(name: str, row: int, start: float, end: float, phase: StepPhase) -> None:
        events.append(
            {
                "name": name,
                "cat": "step",
                "ph": "X",
                "pid": 1,
                "tid": row,
                "ts": round((start - began) * 1e6, 1),
                "dur": round((end - start) * 1e6, 1),
                "args": {
                    "step": phase.step_id,
                    "tokens": phase.num_tokens,
                    "sequences": phase.num_sequences,
                },
            }
        )

    handed_over: dict[int, float] = {}
    for phase in phases:
        end = phase.start + phase.seconds
        add(phase.phase, _LOOP, phase.start, end, phase)
        if phase.phase == "schedule":
            handed_over[phase.step_id] = end
        elif phase.phase == "execute" and phase.step_id in handed_over:
            row = _FLIGHT + phase.step_id % 2
            add(f"step {phase.step_id}", row, handed_over.pop(phase.step_id), end, phase)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _row(row: int, name: str) -> dict[str, Any]:
    return {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}
