"""uvicorn's server, quiet while nothing happens."""

from __future__ import annotations

import asyncio
import contextlib

import uvicorn

_DATE_EVERY_S = 1.0  # the Date header counts seconds


class HttpServer(uvicorn.Server):
    """Waits to be told that it should end, where uvicorn looks ten times a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        # uvicorn's own handlers raise the signal again once all is done, and the exit status with it.
        self.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
        self._told = asyncio.Event()

    def end(self, *, at_once: bool = False) -> None:
        """Takes no more connections; what runs may finish, unless it is to end ``at_once``."""
        self.should_exit = True
        self.force_exit = self.force_exit or at_once
        self._told.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), _DATE_EVERY_S)
