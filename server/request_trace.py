"""What the parts that answer a request tell its trace. ``tracing`` makes spans of it, if traces are wanted.

Like keys, the trace comes with the context rather than through the routes.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from scheduler.messages import FinishReason, Request
from server.call import Call


@dataclass(frozen=True, slots=True)
class SequenceTimes:
    """How one sequence of a call went. Times are ``time.monotonic()``; 0.0 if it never got there.

    Attributes:
        scheduled: when it left the queue for the first time.
        first_token, last_token: when those tokens reached this process.
        num_cached_tokens: tokens of the prompt that came from the prefix cache.
    """

    request: Request
    reason: FinishReason
    num_tokens: int
    num_cached_tokens: int
    scheduled: float
    first_token: float
    last_token: float
    ended: float


class RequestTrace(Protocol):
    """The trace of one HTTP request."""

    def describe(self, call: Call) -> None:
        """What the request asks for, once that is known. No prompt and no answer gets into a trace."""
        ...

    def add(self, times: SequenceTimes) -> None:
        """A sequence of the call has ended."""
        ...


# The trace of the request that the current task works for.
request_trace: ContextVar[RequestTrace | None] = ContextVar("request_trace", default=None)
