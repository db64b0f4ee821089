"""The calls that wait or run at this moment, for operators."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from server.admission import Admission
from server.api_keys import cache_scope
from server.call import Call
from server.choice import Choice
from server.errors import AbortedError
from server.logs import http_request_id


@dataclass(frozen=True, slots=True, eq=False)
class _RunningCall:
    call: Call
    choices: Sequence[Choice]
    x_request_id: str | None
    key: str | None


class RunningCalls:
    """Every call between its admission and its end. Knows numbers, never what was said."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._calls: dict[int, _RunningCall] = {}

    def __len__(self) -> int:
        return len(self._calls)

    @contextmanager
    def entered(self, call: Call, choices: Sequence[Choice]) -> Iterator[None]:
        """The time of a call that has been admitted."""
        running = _RunningCall(call, choices, http_request_id.get(), cache_scope.get())
        self._calls[id(running)] = running
        try:
            yield
        finally:
            del self._calls[id(running)]

    def as_json(self) -> list[dict[str, Any]]:
        """One object a call, the oldest first."""
        now = time.monotonic()
        shown = []
        for running in self._calls.values():
            call, choices = running.call, running.choices
            num_tokens = sum(choice.num_tokens for choice in choices)
            is_waiting = all(self._admission.is_waiting(request.request_id) for request in call.requests)
            shown.append(
                {
                    "id": call.id,
                    "x_request_id": running.x_request_id,
                    "key": running.key,
                    "model": call.model,
                    "state": "waiting" if is_waiting else "answering" if num_tokens else "begun",
                    "age_seconds": round(now - call.requests[0].arrival_time, 3),
                    "is_stream": call.is_stream,
                    "choices": len(choices),
                    "prompt_tokens": sum(len(prompt.token_ids) for prompt in call.prompts),
                    "generated_tokens": num_tokens,
                    "max_tokens": sum(request.params.max_tokens for request in call.requests),
                }
            )
        return shown

    def abort(self, request_id: str) -> list[str]:
        """Ends the calls with this id, ``x-request-id`` or engine id with an error.

        Returns the ids of those calls; there may be several, since clients choose their ``x-request-id``.
        """
        found = [
            running
            for running in self._calls.values()
            if request_id in (running.call.id, running.x_request_id)
            or any(request.request_id == request_id for request in running.call.requests)
        ]
        for running in found:
            for request in running.call.requests:
                self._admission.fail(request.request_id, AbortedError())
        return [running.call.id for running in found]
