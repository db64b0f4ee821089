"""The engine's outputs for all sequences of a call, as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from scheduler.messages import EngineOutput, Request
from server.admission import Admission
from server.engine_protocol import EngineClient

Batch = list[tuple[int, EngineOutput]]


class OutputStreams(Protocol):
    """Where the outputs for the sequences of a call come from."""

    def batches(self) -> AsyncGenerator[Batch, None]:
        """(index of the request, output) pairs until each has its last. Closing the generator aborts what
        has not finished. Raises ApiError.
        """
        ...

    def close(self, index: int) -> None:
        """Ends one request early while the others go on."""
        ...


class EngineStreams:
    """Sends requests to the engine, each when it is its turn, and hands out what comes back; what arrived
    together comes together."""

    def __init__(self, engine: EngineClient, admission: Admission, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._admission = admission
        self._requests = requests
        self._tasks: list[asyncio.Task[None]] = []

    def batches(self) -> AsyncGenerator[Batch, None]:
        """(index of the request, output) pairs. The consumer closes the generator when it has seen enough;
        every request that has not finished is aborted then.

        Raises:
            EngineDeadError: the engine does not take a request.
            QueueTimeoutError, DeadlineError: it took too long.
        """
        return self._one() if len(self._requests) == 1 else self._many()

    def close(self, index: int) -> None:
        """Ends one request early while the others go on. A single one ends with the generator."""
        if self._tasks:
            self._tasks[index].cancel()

    async def _one(self) -> AsyncGenerator[Batch, None]:
        request = self._requests[0]
        await self._admission.turn(request.request_id)
        async with aclosing(self._engine.generate(request)) as outputs:
            has_begun = False
            async for output in outputs:
                if not has_begun:
                    has_begun = True
                    self._admission.begin(request.request_id)
                yield [(0, output)]

    async def _many(self) -> AsyncGenerator[Batch, None]:
        arrived = asyncio.Event()
        batch: Batch = []
        failures: list[Exception] = []

        async def pump(index: int, request: Request) -> None:
            try:
                await self._admission.turn(request.request_id)
                async with aclosing(self._engine.generate(request)) as outputs:
                    async for output in outputs:
                        self._admission.begin(request.request_id)
                        batch.append((index, output))
                        arrived.set()
            except Exception as error:
                failures.append(error)
                arrived.set()
            finally:
                self._admission.end(request.request_id)

        self._tasks = [
            asyncio.create_task(pump(index, request)) for index, request in enumerate(self._requests)
        ]
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                if failures:
                    raise failures[0]
                taken, batch[:] = batch[:], []
                yield taken
        finally:
            for task in self._tasks:
                task.cancel()
