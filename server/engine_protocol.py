"""What the HTTP side asks of an engine. ``engine_link`` implements it over ZeroMQ, the tests in process."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from scheduler.messages import EngineOutput, EngineStats, ExecutorSpec, Request
from server.errors import ApiError, EngineDeadError
from server.histogram import STEP_TOKENS_BUCKETS, Histogram


class EngineClient(Protocol):
    """An engine that takes requests and streams what becomes of them."""

    @property
    def spec(self) -> ExecutorSpec:
        """What the engine offers. Raises EngineDeadError before it was ready for the first time."""
        ...

    @property
    def stats(self) -> EngineStats:
        """State after the last step that was reported."""
        ...

    @property
    def step_tokens(self) -> Histogram:
        """Tokens computed in each step, by ``STEP_TOKENS_BUCKETS``, over all lives of the engine."""
        ...

    @property
    def num_restarts(self) -> int:
        """Engines that ended unasked and were replaced."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken now."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[EngineOutput, None]:
        """Outputs of a request, the last with a finish reason. Closing the generator aborts the request.

        Outputs that pile up while nobody asks may be joined into one.

        Raises:
            EngineDeadError: from the generator, if the engine does not take the request or dies.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request in the engine; one that has ended already is no error."""
        ...

    def fail(self, request_id: str, error: ApiError) -> None:
        """Ends a request and its stream with an error; one that has ended already is no error."""
        ...


class _NoEngine:
    """An engine that has done nothing and takes nothing."""

    stats = EngineStats()
    step_tokens = Histogram(STEP_TOKENS_BUCKETS)
    num_restarts = 0
    is_ready = False

    @property
    def spec(self) -> ExecutorSpec:
        raise EngineDeadError("there is no engine")

    def generate(self, request: Request) -> AsyncGenerator[EngineOutput, None]:
        raise EngineDeadError("there is no engine")

    def abort(self, request_id: str) -> None:
        """It has none."""

    def fail(self, request_id: str, error: ApiError) -> None:
        """It has none."""


NO_ENGINE = _NoEngine()
